"""Runs the commands around a model's server, the hooks and `cmd_stop`: each to its end or its deadline.

When each is due, and what its failure means, is decided in `process`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from trioswap import proctree
from trioswap.config import ModelConfig
from trioswap.limits import Limit, Limits
from trioswap.logs import Logs
from trioswap.output import OUTPUT_GRACE, Output, exit_text
from trioswap.proctree import MARKER
from trioswap.spawning import Child, SpawnTooLate, shortage, spawn
from trioswap.stopping import pauses
from trioswap.upstream import reason

logger = logging.getLogger(__name__)

# SIGKILL takes effect at once unless the process sleeps in the kernel; then it is left to the sweep.
KILL_WAIT: Final = 1.0


def limit(spec: ModelConfig, *names: str) -> float:
    """Seconds that the hooks *names* of *spec* may take, with their end when they are late."""
    there = [name for name in names if getattr(spec.hooks, name) is not None]
    return len(there) * (spec.hook_timeout + KILL_WAIT + OUTPUT_GRACE)


@attrs.define(eq=False)
class Commands:
    """Runs the commands of one attempt within its *limits*; its marker is on them, so what they leave is swept, too."""

    limits: Limits
    marker: str
    logs: Logs
    ran: bool = False
    """A hook was begun."""
    deaf: list[Child] = attrs.field(factory=list)
    """Commands that SIGKILL did not end in time; each is a zombie until its `returncode` is asked."""
    shortage: str | None = None
    """What we had run out of, when one could not be run for that (`spawning.shortage`)."""

    async def hook(self, name: str, pid: int | None = None) -> str | None:
        """Run the hook *name*, if there is one; return why it failed, in a sentence."""
        spec = self.limits.spec
        argv: tuple[str, ...] | None = getattr(spec.hooks, name)
        if argv is None:
            return None
        self.ran = True
        logger.info("hook begins model=%s hook=%s", spec.name, name)
        why = await self.run(argv, pid, self.limits.begin("hook_timeout"))
        return f"hook {name} {why}" if why else None

    async def run(self, argv: Sequence[str], pid: int | None, limit: Limit) -> str | None:
        """Run *argv*, ${PID} filled in, and kill it at the end of *limit*.

        Returns:
            None: it ended with 0; else why it failed, to follow its name.
        """
        spec = self.limits.spec
        output = Output(spec.name, self.logs)
        children: list[Child] = []
        filled = argv if pid is None else [part.replace("${PID}", str(pid)) for part in argv]
        env = {**spec.env, MARKER: self.marker}
        async with trio.open_nursery() as nursery:

            def adopt(child: Child) -> None:
                children.append(child)
                nursery.start_soon(output.keep, child)

            try:
                await spawn(filled, env, adopt, deadline=limit.deadline)
                with self.limits.keep(limit):
                    await children[0].wait()
            except SpawnTooLate:
                return f"did not end within {limit}"
            except (OSError, ValueError) as exc:
                self.shortage = shortage(exc)
                return f"cannot be run ({argv[0]!r}): {reason(exc)}"
            finally:
                # Before it is killed: a late one that ends just then was late all the same.
                code = children[0].returncode if children else None
                for child in children:
                    await self._end(child)
                output.scope.deadline = trio.current_time() + OUTPUT_GRACE
        if code is None:
            return f"did not end within {limit}"
        return f"{exit_text(code)}{output.last_line}" if code else None

    async def _end(self, child: Child) -> None:
        """Kill its group if it has not ended."""
        if child.returncode is None:
            child.signal_group(signal.SIGKILL)
            # Shielded, or a zombie would be left.
            with trio.move_on_after(KILL_WAIT, shield=True):
                await child.wait()
                await _wait_gone(child.pid)
            if child.returncode is None:
                self.deaf.append(child)


async def _wait_gone(session: int) -> None:
    """Return when nobody is left in *session*, whose leader was ours until now.  May wait for ever.

    Not told by the marker: who has been killed loses that before it gives back what it holds.
    """
    for pause in pauses():
        with contextlib.suppress(OSError):  # nobody can say
            if not proctree.members(session, ""):
                return
        await trio.sleep(pause)
