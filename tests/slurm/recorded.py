"""What Slurm prints, as recorded (names of machines and users made up), and programs that print it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

# scontrol show job --details, Slurm 22.05; parts that do not matter left out.
ONE_NODE = """\
JobId=1 JobName=nanogpt
   JobState=RUNNING Reason=None Dependency=(null)
   NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   JOB_GRES=gpu:h200:2
     Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:h200:2(IDX:0-1)
   TresPerNode=gres:gpu:h200:2
"""
TWO_NODES = """\
JobId=2 JobName=nanogpt
   JOB_GRES=gpu:h100:8
     Nodes=node[07,09] CPU_IDs=0-59 Mem=98304 GRES=gpu:h100:4(IDX:0-3)
"""
UNLIKE_NODES = """\
JobId=3 JobName=nanogpt
     Nodes=a1 CPU_IDs=0-59 Mem=98304 GRES=gpu:a100_80gb:2(IDX:0-1),gpu:h100:2(IDX:2-3)
     Nodes=a2 CPU_IDs=0-59 Mem=98304 GRES=gpu:4(IDX:0-3),nic:1(IDX:0)
"""
NO_GPU = """\
JobId=4 JobName=nanogpt
     Nodes=n1 CPU_IDs=0 Mem=0 GRES=
"""

SQUEUE = """\
120_[4-9]|120|PENDING|0:00|40:00|gpu|1|Priority||/home/ada/speedrun|tiny
120_3|124|RUNNING|1:05|38:55|gpu|1|None|n1|/home/ada/speedrun|tiny
77|77|RUNNING|10:00|20:00|gpu|2|None|n[1-2]|/home/ada/speedrun|a|strange name
76|76|FAILED|0:03|37:00|gpu|1|NonZeroExitCode|n1|/home/ada/speedrun|tiny
"""
# sacct --noheader --parsable2 --allocations, format as nanogpt.cluster.jobs asks.
SACCT = """\
70|70|COMPLETED|00:05:12|gpu|1|n1|0:0|tiny
71|71|CANCELLED by 1000|00:00:42|gpu|1|n2|0:15|tiny
72_0|72|FAILED|00:00:03|gpu|1|n2|2:0|tiny
77|77|RUNNING|00:10:00|gpu|2|n[1-2]|0:0|a|strange name
"""
SACCT_OFF = "Slurm accounting storage is disabled\n"


def program(directory: Path, name: str, answers: Mapping[str, str], *, code: int = 0) -> Path:
    """A program in `directory` that prints the answer whose key is part of its arguments, and notes the arguments."""
    directory.mkdir(exist_ok=True)
    cases = "".join(f"    *{shlex.quote(key)}*) printf %s {shlex.quote(text)} ;;\n" for key, text in answers.items())
    path = directory / name
    path.write_text(
        f'#!/bin/sh\necho {name} "$@" >> {directory}/calls\ncase "$*" in\n{cases}    *) : ;;\nesac\nexit {code}\n'
    )
    path.chmod(0o755)
    return path
