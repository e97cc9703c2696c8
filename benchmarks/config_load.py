"""What reading a configuration costs: large files in both languages, and a matrix that nobody could write out.

    models      MODELS models, as people have them: macros, aliases, an environment, filters, profiles, one group
    matrix      SLOTS times "one of CHOICES models", all together: CHOICES ** SLOTS combinations
    question    who must go so that a model can be loaded, in that matrix, with a model in each slot resident

A file is read REPEATS times, from its text on the disk to the checked configuration.  Each
question is asked REPEATS times as well, of matrices that have not heard it before.  Other
programs can only make it slower, so the best time of a file is judged, and of all questions
the one with the worst best time.

Run it with `nox -s bench`.  Exits with 1 when a promise is not kept.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trioswap.config import Config
from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.convert import YAML, convert
from trioswap.residency.matrix import Matrix

READING, ANSWERING = 1.0, 0.010  # seconds, promised
MODELS = 1_000
SLOTS, CHOICES = 12, 10
QUESTIONS = 100
REPEATS = 5


# ---- files ------------------------------------------------------------------------------------


def many_models() -> str:
    """A TOML file of `MODELS` models."""
    tables = "".join(_model(f"model-{number:04}", number) for number in range(MODELS))
    group = ", ".join(f'"model-{number:04}"' for number in range(0, MODELS, 2))
    pins = "".join(f'name-{number} = "alias-{number}"\n' for number in range(0, MODELS, 10))
    macros = '[macros]\nbin = "/opt/llama"\nserver = "${bin}/llama-server --port ${PORT}"\n'
    return f"{macros}\n{tables}[groups.large]\nmembers = [{group}]\n\n[profiles.night.pins]\n{pins}"


def _model(name: str, number: int) -> str:
    return f"""[models.{name}]
cmd = '''
# number {number}
${{server}} -m "/models/${{MODEL_ID}}.gguf" \\
  --ctx-size 8192
'''
aliases = ["alias-{number}"]
ttl = "10m"
env = {{ CUDA_VISIBLE_DEVICES = "{number % 8}" }}
filters.strip_params = ["temperature"]
filters.set_params_by_id."${{MODEL_ID}}:think".thinking = true
metadata = {{ number = {number} }}

"""


def large_matrix() -> str:
    """A TOML file whose only set stands for `CHOICES ** SLOTS` combinations."""
    slots = [" | ".join(f"m{slot}-{choice}" for choice in range(CHOICES)) for slot in range(SLOTS)]
    models = "".join(f'm{slot}-{choice}.cmd = "x ${{PORT}}"\n' for slot in range(SLOTS) for choice in range(CHOICES))
    return f'[models]\n{models}\n[matrix.sets]\nall = "{" & ".join(f"({slot})" for slot in slots)}"\n'


def read(file: Path) -> Config:
    """The configuration in *file*."""
    return load_sources([file], None, {}, translate)


# ---- times ------------------------------------------------------------------------------------


def times_of(act: Callable[[], object]) -> list[float]:
    """Seconds that *act* takes, each time."""
    times = []
    for _ in range(REPEATS):
        gc.collect()
        begun = time.perf_counter()
        act()
        times.append(time.perf_counter() - begun)
    return times


def answer_times(config: Config) -> list[float]:
    """Seconds that the best answer to each of `QUESTIONS` takes, in the matrix of *config*."""
    assert config.matrix is not None
    rng = random.Random(0)
    matrices = [Matrix(config.matrix) for _ in range(REPEATS)]
    best = []
    for _ in range(QUESTIONS):
        *resident, target = [f"m{slot}-{rng.randrange(CHOICES)}" for slot in (*range(SLOTS), rng.randrange(SLOTS))]
        times = []
        for matrix in matrices:
            begun = time.perf_counter()
            solution = matrix.solve(target, resident)
            times.append(time.perf_counter() - begun)
            assert len(solution.evict) == (target not in resident), solution
        best.append(min(times))
    return best


# ---- the table --------------------------------------------------------------------------------


def line(what: str, judged: float, times: Sequence[float], promise: float) -> bool:
    """Print it, in milliseconds; return whether the promise is kept."""
    kept = judged <= promise
    figures = " ".join(f"{1e3 * figure:9.2f}" for figure in (judged, statistics.median(times)))
    print(f"  {what:40} {figures} {1e3 * promise:9.0f}{'' if kept else '   broken'}")
    return kept


def main() -> int:
    """Measure, print, judge."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # each figure when it is there
    print(f"{'milliseconds':42} {'judged':>9} {'median':>9} {'promise':>9}")
    kept = []
    with tempfile.TemporaryDirectory() as directory:
        for name, text in ((f"{MODELS} models", many_models()), (f"{CHOICES} ** {SLOTS} sets", large_matrix())):
            native, foreign = Path(directory) / "c.toml", Path(directory) / "c.yaml"
            native.write_text(text)
            foreign.write_text(convert(native, YAML, {}).text)
            for file in (native, foreign):
                times = times_of(lambda file=file: read(file))  # type: ignore[misc]
                kept.append(line(f"{name}, {file.suffix[1:].upper()}", min(times), times, READING))
        times = answer_times(read(native))
    kept.append(line("a question", max(times), times, ANSWERING))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
