"""`fusenc profile SCRIPT`: a user's program under torch.profiler, its operators, and what `fuse` would take over."""

from __future__ import annotations

import copy
import itertools
import signal
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fusenc
import torch
from rich.console import Console
from torch import nn
from torch.profiler import record_function

from .. import environment
from . import report
from .advice import Advice, on_host, on_limits
from .operators import Breakdown, break_down, events_of, quiet_profiler
from .workload import ProfileError

MARK = "fusenc: first call of a model"

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""

_INSIDE = tuple(
    str(Path(torch.__file__).parent / part)
    for part in ("autograd", "_dynamo", "_inductor", "_functorch", "_ops.py", "_library")
)
"""Code of torch that calls Python back from inside an operator or the autograd engine."""

_RETRY_SECONDS = 0.02


@dataclass
class Outlook:
    """What `fusenc.fuse` would do with a model."""

    name: str
    fused: list[str]
    left: dict[str, str]


class Recorder:
    """Records a program's operators, at most so many seconds from the first call of a model on."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.cut = False
        """True if the program ran on after the limit."""
        self.called: tuple[weakref.ref[nn.Module], Outlook] | None = None
        """The first module with parts that was called; it may live in a function that has returned since."""
        self.before = 0.0
        """Seconds until then."""
        self.seconds = 0.0
        """Seconds recorded after that."""
        self._running = False
        self._profiler = quiet_profiler(torch.cuda.is_available())
        plain_call = self._plain_call = nn.Module.__call__

        # Instead of a hook on all modules, while which is set `fuse` leaves layers alone and layers run other code.
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._see(module)
            return plain_call(module, *args, **kwargs)

        self._call = call

    def start(self) -> None:
        """Begin to record."""
        nn.Module.__call__ = self._call  # type: ignore[method-assign]
        self._profiler.start()
        self._running = True
        self._start = time.perf_counter()

    def stop(self) -> None:
        """End; a second call does nothing."""
        if not self._running:
            return
        self._running = False
        nn.Module.__call__ = self._plain_call  # type: ignore[method-assign]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        self._profiler.stop()

    def _see(self, module: nn.Module) -> None:
        """Take note of a call, if it is the first of a module with parts; others are hardly the model."""
        if not any(True for _ in module.children()):
            return
        nn.Module.__call__ = self._plain_call  # type: ignore[method-assign]
        self.called = (weakref.ref(module), outlook(type(module).__name__, module))
        now = time.perf_counter()
        self.before, self._start = now - self._start, now
        with record_function(MARK):
            pass
        alarm = getattr(signal, "SIGALRM", None)  # Windows has none: there the whole program is recorded
        free = alarm is not None and signal.getsignal(alarm) == signal.SIG_DFL
        if free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, self.limit)

    def _on_alarm(self, _: int, frame: types.FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(_INSIDE):  # stopped inside an operator the profiler would break
                signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
                return
            frame = frame.f_back
        self.cut = True
        self.stop()

    def disarm(self) -> None:
        """No alarm after this."""
        if hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) == self._on_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def breakdown(self) -> Breakdown:
        """The time from the first call of a model on; of all that was recorded if there was none."""
        events = events_of(self._profiler)
        since = next((event.start for event in events if event.name == MARK), 0)
        return break_down(events, self.seconds, torch.cuda.is_available(), since)

    def write_trace(self, file: Path) -> None:
        """For Perfetto."""
        self._profiler.export_chrome_trace(str(file))


def outlook(name: str, model: nn.Module) -> Outlook:
    """What `fusenc.fuse` would do; the model is not touched: a twin of its modules shares its tensors."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:  # whatever a module holds that cannot be copied
        return Outlook(name, [], {"": f"it cannot be copied to look at ({type(error).__name__}: {error})"})
    before = {path: type(module) for path, module in twin.named_modules()}
    done = fusenc.fuse(twin)
    changed = [path for path, module in twin.named_modules() if type(module) is not before[path]]
    left = dict.fromkeys(done.fused.keys() - set(changed), "already fused") | done.left
    return Outlook(name, changed, left)


def outlooks(variables: dict[str, Any], recorder: Recorder) -> list[Outlook]:
    """Of the models in a script's variables, and of the first one that it called."""
    models = {name: value for name, value in variables.items() if isinstance(value, nn.Module)}
    parts = {id(part) for model in models.values() for part in itertools.islice(model.modules(), 1, None)}
    found: dict[int, Outlook] = {}
    for name, model in models.items():
        if id(model) not in parts and id(model) not in found:
            found[id(model)] = outlook(name, model)
    if recorder.called is not None:
        reference, seen = recorder.called
        called = reference()
        if called is None or (id(called) not in parts and id(called) not in found):
            found[id(reference)] = seen
    return list(found.values())


def advise(breakdown: Breakdown, models: Sequence[Outlook]) -> list[Advice]:
    """What to fuse, and what bounds the gain."""
    found = []
    for model in models:
        reasons = "; ".join(sorted(set(model.left.values())))
        figures = {"modules": float(len(model.fused))}
        if model.fused:
            left = f"; {len(model.left)} left: {reasons}" if model.left else ""
            text = f"{model.name}: fusenc.fuse(model) would take over {len(model.fused)} modules{left}"
            found.append(Advice("fuse", True, text, figures))
        else:
            found.append(Advice("fuse", False, f"{model.name}: nothing to fuse: {reasons}", figures))
    if any(model.fused for model in models):
        found += on_limits(breakdown, "the recorded time")
    return [*found, *on_host(breakdown, "the recorded time")]


def run(
    script: Path, arguments: Sequence[str], threads: int | None, seconds: float, out: Path,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Run a script as Python would, record it, print its operators and write them into a folder.

    Args:
        script: the file.
        arguments: what it finds in ``sys.argv`` after its name.
        threads: of torch on the CPU.
        seconds: recorded from the first call of a model on; the script runs on after them.
        out: where files are written; made if it is not there.
        console: where tables are printed, after all that the script prints.

    Returns:
        The script's own exit status: 1 after an exception, which is shown, and 130 after Ctrl-C.

    Raises:
        ProfileError: there is no such file.
        OSError: `out` cannot be written.
    """
    if not script.is_file():
        raise ProfileError(f"SCRIPT: no file at {script}")
    out = out.absolute()  # the script may change the working directory
    out.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = report.wide_console(console)
    recorder = Recorder(seconds)
    status, variables = _execute(script, arguments, recorder)
    sys.stdout.flush()
    breakdown = recorder.breakdown()
    models = outlooks(variables, recorder)
    advice = (
        [] if status and recorder.called is None else advise(breakdown, models)
    )  # it broke off before there was work
    rest = ", then it ran on" if recorder.cut else ""
    console.rule(f"fusenc profile {script.name}")
    if recorder.called is None:
        console.print(f"{recorder.seconds:.2f} s recorded{rest}; no model was called", highlight=False)
    else:
        text = (
            f"{recorder.seconds:.2f} s recorded{rest}, after {recorder.before:.2f} s before the first call of a model"
        )
        console.print(text, highlight=False)
    if breakdown.operators:
        report.print_operators(console, {script.name: breakdown}, "Where the time goes")
        report.plot_operators({script.name: breakdown}, out / "operators.svg")
        recorder.write_trace(out / "trace.json.gz")
    else:
        console.print("No operator of torch ran")
    report.print_advice(console, advice)
    found = {
        "script": str(script), "arguments": list(arguments), "status": status, "machine": environment.summary(),
        "seconds": recorder.seconds, "seconds_before": recorder.before, "cut": recorder.cut,
        "operators": asdict(breakdown), "models": [asdict(m) for m in models], "advice": [asdict(a) for a in advice],
    }  # fmt: skip
    report.write_json(found, out / "profile.json")
    console.print(f"Written to {out}; open the trace at https://ui.perfetto.dev", soft_wrap=True, highlight=False)
    return status


def _execute(script: Path, arguments: Sequence[str], recorder: Recorder) -> tuple[int, dict[str, Any]]:
    """Run the script as ``__main__``; its exit status and its variables, which stay after ``sys.exit`` too."""
    program = types.ModuleType("__main__")
    program.__file__ = str(script)
    program.__builtins__ = __builtins__  # type: ignore[attr-defined]
    status = 0
    with _as_main(program, script, arguments):
        try:
            recorder.start()
            exec(compile(script.read_bytes(), str(script), "exec", dont_inherit=True), program.__dict__)
        except SystemExit as leave:
            if isinstance(leave.code, str):
                print(leave.code, file=sys.stderr)
            status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
                trace = trace.tb_next
            traceback.print_exception(type(error), error, trace)
            status = 1
        finally:
            recorder.disarm()
            recorder.stop()
    return status, program.__dict__


@contextmanager
def _as_main(program: types.ModuleType, script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """What Python sets for a script: its arguments, its folder on the path, its module under ``__main__``."""
    argv, path, main = sys.argv, sys.path, sys.modules["__main__"]
    sys.argv, sys.path = [str(script), *arguments], [str(script.resolve().parent), *path]
    sys.modules["__main__"] = program
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path
        sys.modules["__main__"] = main
