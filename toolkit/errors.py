"""The exceptions that end a job with one line instead of a traceback."""


class UsageError(ValueError):
    """Something the user gave can't be used.

    Its text is one line: what was found, what is accepted, what to do. Uncaught, it ends the job
    with that line and exit code 2.
    """

    ag_pass_through = True  # read by TensorFlow, which would wrap one raised in a traced function in its own error


class RanksDiffer(RuntimeError):
    """The ranks no longer hold the same model; raised on all of them alike.

    Its text names the step, the first tensors that differ, the ranks, and the largest difference.
    Uncaught, it ends the job with that line, from rank 0, and exit code 1.
    """
