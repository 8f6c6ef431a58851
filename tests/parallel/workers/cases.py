"""Cases that every rank runs together."""

import traceback

CASES = []


def case(function):
    CASES.append(function)
    return function


def run_cases(dp, world, names):
    """Run every case, or the named ones, on every rank; the first prints `passed <case>` where all came through."""
    for function in CASES:
        if names and function.__name__ not in names:
            continue
        try:
            function()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        problems = dp.gather(problem, all_groups=True)
        if world.rank == world.group == 0:
            found = [f"rank {r}: {p}" for r, p in enumerate(problems) if p]
            print("\n".join(found) or f"passed {function.__name__}", flush=True)
    dp.stop()
