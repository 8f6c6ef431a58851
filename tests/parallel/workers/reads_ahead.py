"""Run a script in which a thread cuts the batches from the third on, however fast it is.

python reads_ahead.py SCRIPT ARGUMENTS…
"""

import atexit
import runpy
import sys
import threading
from pathlib import Path

from toolkit import reading


class Reader(reading._Reader):
    """Counts those that began."""

    began = 0

    def start(self):
        Reader.began += 1
        super().start()


def tell():
    left = sum(isinstance(thread, Reader) for thread in threading.enumerate())
    print(f"reading threads: {Reader.began} began, {left} left", flush=True)


reading._SLOW = -1.0
reading._RECYCLED = 0
reading._Reader = Reader
atexit.register(tell)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
