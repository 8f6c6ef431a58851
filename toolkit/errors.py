"""The exceptions that end a job with one line instead of a traceback."""


class UsageError(ValueError):
    """Something the user gave can't be used.

    Its text is one line: what was found, what is accepted, what to do. Uncaught, it ends the job
    with that line and exit code 2.
    """

    ag_pass_through = True  # read by TensorFlow, which would wrap one raised in a traced function in its own error


class RunFailed(RuntimeError):
    """A check of the run failed; raised on all ranks alike.

    Its text is one line. Uncaught, it ends the job with that line, from rank 0, and exit code 1.
    """


class RanksDiffer(RunFailed):
    """The ranks no longer hold the same model; names the step, the tensors, the ranks, the largest difference."""


class SamplesDiffer(RunFailed):
    """The ranks together did not use each sample of an epoch once; names the samples by index."""
