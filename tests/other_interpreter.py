"A script of ours in another interpreter, asked line by line: peers that cannot live beside medsim."

import os
import subprocess
from typing import Any


class Peer:
    "`script` in the interpreter `python`, where `needs` is installed."

    def __init__(self, python: str, script: str, needs: str) -> None:
        self.needs, clean = needs, {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL, env=clean)

    def rate(self, *asked: Any) -> float:
        "The number that it answers."
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(" ".join(map(str, asked)) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line[:1].isdigit(): return float(line)
        raise RuntimeError(f"the peer's interpreter ended: has it {self.needs}?")
