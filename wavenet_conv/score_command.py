"""The work of `wavenet-conv score`: lines in, rows of scores out, in bounded memory, resumable where there is a file.

Knows lines, rows and files; nothing of arguments' spelling, of exit codes or of how a name is scored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from argparse import Namespace
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, islice
from math import inf, log
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from .checkpoint import DEFAULT
from .errors import CheckpointError, NamesError, OutputError, UsageError, WaveNetConvError
from .files import write_whole
from .scoring import Scorer

CHUNK_LINES = 2**17  # lines scored, written and recorded together; scores do not depend on it
CHUNK_BYTES = 2**20  # a chunk of longer lines ends here; no line may be longer, so that memory stays bounded
QUIET_SECONDS = 2  # a job shorter than this reports no progress, unless to a terminal
BOM = b"\xef\xbb\xbf"


class ClosedPipe(Exception):
    """Whoever read the rows has read enough."""


@dataclass(frozen=True)
class Done:
    """How far a run is. input_sha256: of the bytes read, where the input is a stream and has no other identity."""

    lines: int = 0
    input_bytes: int = 0
    input_sha256: str | None = None
    output_bytes: int = 0


def score(options: Namespace) -> None:
    """Scores the lines of `options.file` and writes a row for each.

    options: file, model, device, output, format, per_position, unknown, sort, limit and chunk, as `cli` names them.
    Raises `UsageError` where nothing could be begun, `NamesError` for a bad line, `OutputError` where the rows cannot
    be written, and `ClosedPipe`.
    """
    with ExitStack() as stack:
        source = stack.enter_context(closing(Source(options.file)))
        _check_distinct(options)
        scorer = _scorer(options)
        rows = Rows(scorer, options)
        if options.output is None:
            sink = StandardOutput()
        else:
            sink = stack.enter_context(closing(ResumableFile(options.output, _fingerprint(options, scorer, source))))
        source.skip(sink.done)
        sink.begin()
        meter = stack.enter_context(closing(Meter(source.size, sink.done.lines)))
        try:
            if not sink.done.lines:
                sink.write(rows.header)
            (_sorted if options.sort else _in_order)(source, rows, sink, meter, options)
        except NamesError:
            sink.discard()  # with these arguments it can never be finished, so nothing of it should refuse others
            raise
        sink.finish()


def _in_order(source: Source, rows: Rows, sink: Sink, meter: Meter, options: Namespace) -> None:
    limit = sys.maxsize if options.limit is None else options.limit
    while raw := source.read(min(options.chunk, limit - source.lines)):
        names = source.names(raw)
        with _line_numbers(source, names, rows.scorer):
            data = rows(names)
        sink.write(data)
        sink.record(source.done())
        meter.update(source.lines, source.offset)


def _sorted(source: Source, rows: Rows, sink: Sink, meter: Meter, options: Namespace) -> None:
    """Most bits a character first. Holds a key and an offset a line, reads lines again and scores them again."""
    source.spool()
    keys, starts = array("d"), array("q")
    while raw := source.read(options.chunk):
        starts.extend(islice(accumulate(map(len, raw), initial=source.offset - sum(map(len, raw))), len(raw)))
        names = source.names(raw)
        with _line_numbers(source, names, rows.scorer):
            keys.extend(rows.bits(names).tolist())
        meter.update(source.lines, source.offset)
    if not keys:
        return
    ascending = -torch.frombuffer(keys, dtype=torch.float64)
    ascending.masked_fill_(ascending.isnan(), inf)
    order = ascending.argsort(stable=True)[: options.limit]
    lines = source.again(starts[index] for part in order.split(options.chunk) for index in part.tolist())
    while raw := _gather(lines, options.chunk):
        sink.write(rows(source.names(raw)))


class Source:
    """The lines of a file or a stream, and where they stand.

    `lines` and `offset` say how many lines and bytes have been read; `size` is the file's, None where there is no end.
    """

    def __init__(self, path: str):
        self.where = "standard input" if path == "-" else path
        self.path, self.first, self.lines, self.offset = path, 0, 0, 0
        if path == "-" and sys.stdin is None:
            raise UsageError("standard input is closed; give a file")
        try:
            self.file: BinaryIO = sys.stdin.buffer if path == "-" else open(path, "rb")
        except OSError as error:
            raise UsageError(f"{path}: {_reason(error)}; give a text file with one name a line, or -") from error
        about = os.fstat(self.file.fileno())
        regular = stat.S_ISREG(about.st_mode)
        self.size = about.st_size if regular else None
        self.stream = path == "-" or not regular
        self._digest = hashlib.sha256() if self.stream else None
        self.identity: dict[str, Any] = {"input": path}
        if not self.stream:
            self.identity = {"input": os.path.realpath(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}

    def skip(self, done: Done) -> None:
        """Goes to where an earlier run had come; a stream is read up to there, and must be the same up to there."""
        self.lines, self.offset = done.lines, done.input_bytes
        if self._digest is None:
            self.file.seek(self.offset)
            return
        left = self.offset
        while left and (block := self.file.read(min(left, CHUNK_BYTES))):
            self._digest.update(block)
            left -= len(block)
        if self.offset and (left or self._digest.hexdigest() != done.input_sha256):
            raise UsageError(
                f"{self.where}: its first {self.offset:,} bytes are not those that the unfinished output was made of; "
                f"give the same input, or delete the output's .partial and .progress"
            )

    def spool(self) -> None:
        """Copies a stream to a temporary file, so that its lines can be read again."""
        if not self.stream:
            return
        try:
            file = tempfile.TemporaryFile()
            shutil.copyfileobj(self.file, file, CHUNK_BYTES)
            file.flush()
        except OSError as error:
            raise OutputError(f"the copy of {self.where} in {tempfile.gettempdir()}: {_reason(error)}") from error
        file.seek(0)
        self.file.close()
        self.file, self.size, self.stream, self._digest = file, file.seek(0, os.SEEK_END), False, None
        file.seek(0)

    def read(self, count: int) -> list[bytes]:
        """The next lines with their ends, at most `count`; fewer where they are long, none after the last."""
        self.first = self.lines + 1
        try:
            raw = _gather(iter(partial(self.file.readline, CHUNK_BYTES + 1), b""), count)
        except OSError as error:
            raise WaveNetConvError(f"{self.where}: {_reason(error)}, after line {self.lines:,}") from error
        if self._digest is not None:
            self._digest.update(b"".join(raw))
        start, self.offset = self.offset, self.offset + sum(map(len, raw))
        if not start and raw and raw[0].startswith(BOM):
            raw[0] = raw[0].removeprefix(BOM)
            raw = raw if raw[0] else []
        self.lines += len(raw)
        if raw and len(raw[-1]) > CHUNK_BYTES:
            raise NamesError(
                f"{self.where}, line {self.lines}: longer than {CHUNK_BYTES:,} bytes; give text with one name a line"
            )
        return raw

    def again(self, starts: Iterable[int]) -> Iterator[bytes]:
        """The lines that start at these offsets, each with an end."""
        for start in starts:
            self.file.seek(start)
            yield self.file.readline(CHUNK_BYTES + 1).removesuffix(b"\n") + b"\n"

    def names(self, raw: list[bytes]) -> list[str]:
        """Lines without their ends, `\\n` or `\\r\\n`; nothing else is taken away."""
        data = b"".join(raw)
        try:
            names = data.decode().replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            line, start = data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
            raise NamesError(
                f"{self.where}, line {self.first + line}: byte 0x{data[error.start]:02x} at byte {error.start - start} "
                f"of the line is not UTF-8; save the file as UTF-8"
            ) from error
        return names[: len(raw)]

    def done(self) -> Done:
        return Done(self.lines, self.offset, self._digest and self._digest.hexdigest())

    def close(self) -> None:
        if self.path != "-":
            self.file.close()


class Rows:
    """The rows of names, as bytes: called with a list of names. Numbers have as many digits as tell them apart."""

    def __init__(self, scorer: Scorer, options: Namespace):
        self.scorer, self.unknown, self.per_position = scorer, options.unknown, options.per_position
        self.tsv = options.format == "tsv"
        self.digits = ".17g" if scorer.dtype == torch.float64 else ".9g"
        columns = ["name", "score", "bits_per_character", "positions"][: 4 if self.per_position else 3]
        self.header = ("\t".join(columns) + "\n").encode() if self.tsv else b""
        self._quoted = json.JSONEncoder(ensure_ascii=False).encode

    def bits(self, names: list[str]) -> Tensor:
        return self._bits(names, self.scorer.score(names, unknown=self.unknown))

    def _bits(self, names: list[str], scores: Tensor) -> Tensor:
        return scores / (-log(2) * (torch.tensor(array("q", map(len, names))) + 1))

    def __call__(self, names: list[str]) -> bytes:
        scores = self.scorer.score(names, unknown=self.unknown)
        columns = [map(self._quoted, names), self._numbers(scores), self._numbers(self._bits(names, scores))]
        if self.per_position:
            columns.append(self._positions(names))
            row = "{}\t{}\t{}\t{}\n" if self.tsv else _object("name", "score", "bits_per_character", "positions")
        else:
            row = "{}\t{}\t{}\n" if self.tsv else _object("name", "score", "bits_per_character")
        if self.tsv:
            columns[0] = (name[1:-1] for name in columns[0])
        return "".join(map(row.format, *columns)).encode()

    def _positions(self, names: list[str]) -> Iterator[str]:
        values, offsets = self.scorer.position_log_probs(names, unknown=self.unknown)
        numbers, ends = list(self._numbers(values)), offsets.tolist()
        for start, end in zip(ends, ends[1:]):
            yield ",".join(numbers[start:end]) if self.tsv else f"[{', '.join(numbers[start:end])}]"

    def _numbers(self, values: Tensor) -> Iterator[str]:
        # JSON has no NaN and no infinity.
        for value in values.tolist():
            yield format(value, self.digits) if self.tsv or -inf < value < inf else "null"


class StandardOutput:
    """Rows on standard output. Nothing is remembered, so `done` is nothing."""

    done = Done()

    def __init__(self):
        if sys.stdout is None:
            raise OutputError("standard output is closed; redirect it or give --output FILE")

    def begin(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as error:
            # What is still buffered goes nowhere, so that the interpreter does not complain of it when it ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise ClosedPipe from error
            raise OutputError(f"standard output: {_reason(error)}; the rows are not complete") from error

    def record(self, done: Done) -> None:
        pass

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


class ResumableFile:
    """Rows in `FILE.partial`, how far it is in `FILE.progress`, and `FILE` itself only when all is there.

    The partial file is locked while it is written. The record names the run, and never more rows than are on the disk;
    so a run that was killed at any moment is taken up at the record. `done` is what an earlier run had recorded.
    """

    def __init__(self, path: str, fingerprint: dict[str, Any]):
        self.path, self.fingerprint = Path(os.path.realpath(path)), fingerprint
        self.partial, self.progress = _beside(self.path)
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{path}: not a regular file; leave --output out and redirect standard output to it")
        with self._errors():
            self.file = self._locked()
        try:
            self.done = self._recorded()
        except BaseException:
            self.close()
            raise

    def _locked(self) -> BinaryIO:
        while True:
            file = open(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.partial)):
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                file.close()
                raise OutputError(f"{self.path}: another process is writing it; wait until it ends") from error
            file.close()  # another process renamed it between the opening and the lock

    def _recorded(self) -> Done:
        size = os.fstat(self.file.fileno()).st_size
        mend = f"delete {self.partial} and {self.progress}"
        try:
            found = json.loads(self.progress.read_bytes())
            run, done = dict(found["run"]), Done(**found["done"])
        except FileNotFoundError:
            if size:
                raise UsageError(f"{self.partial} is there without its {self.progress.name}; {mend}") from None
            return Done()
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not size:
                self.partial.unlink()
            raise UsageError(f"{self.progress} is not this command's, or damaged ({error}); {mend}") from error
        if size < done.output_bytes or not done.lines:
            return Done()  # a run that ended, or that had come to nothing yet
        differ = [key for key in {**run, **self.fingerprint} if run.get(key) != self.fingerprint.get(key)]
        if differ:
            listed = "; ".join(f"{key} {run.get(key)} there, {self.fingerprint.get(key)} here" for key in differ)
            raise UsageError(
                f"{self.path}: an unfinished run with other arguments began it ({listed}); "
                f"give its arguments to go on with it, or {mend}"
            )
        return done

    def begin(self) -> None:
        """Takes the output up where the record ends; nothing has been touched before."""
        with self._errors():
            for left in self.path.parent.glob(f".{_literal(self.progress.name)}.*"):
                left.unlink()  # of a run that was killed while it wrote its record
            self._write_record(self.done)
            self.file.truncate(self.done.output_bytes)
            self.file.seek(self.done.output_bytes)

    def write(self, data: bytes) -> None:
        with self._errors():
            self.file.write(data)

    def record(self, done: Done) -> None:
        with self._errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            self._write_record(Done(done.lines, done.input_bytes, done.input_sha256, self.file.tell()))

    def _write_record(self, done: Done) -> None:
        write_whole(self.progress, json.dumps({"run": self.fingerprint, "done": asdict(done)}, indent=1).encode())

    def finish(self) -> None:
        with self._errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.partial, self.path)
            self.progress.unlink()

    def discard(self) -> None:
        with self._errors():
            self.partial.unlink()
            self.progress.unlink()

    def close(self) -> None:
        with self._errors():
            self.file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{self.path}: {_reason(error)}; mend that and start again with the same arguments to go on"
            ) from error


Sink = StandardOutput | ResumableFile


class Meter:
    """How far and how fast, on standard error: live on a terminal, else a line after 2, 4, 8, ... seconds."""

    def __init__(self, size: int | None, lines: int):
        self.size, self.before, self.text, self.shown = size, lines, "", ""
        self.begun, self.next = monotonic(), QUIET_SECONDS
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        terminal = sys.stderr is not None and sys.stderr.isatty()
        # Rows on the same terminal show well enough how far it is.
        self.live = self.console.status("reading") if terminal and not (sys.stdout and sys.stdout.isatty()) else None
        if self.live:
            self.live.start()

    def update(self, lines: int, offset: int) -> None:
        seconds = monotonic() - self.begun
        share = f" ({offset / self.size:.0%})" if self.size else ""
        self.text = f"{lines:,} lines{share}, {(lines - self.before) / max(seconds, 1e-3):,.0f} lines/s"
        if self.live:
            self.live.update(self.text)
        elif seconds >= self.next and sys.stderr is not None:
            self.console.print(self.text)
            self.shown = self.text
            self.next *= 2

    def close(self) -> None:
        if self.live:
            self.live.stop()
        if self.text != self.shown and (self.live or self.shown):
            self.console.print(self.text)


@contextmanager
def _line_numbers(source: Source, names: list[str], scorer: Scorer) -> Iterator[None]:
    """Where a name is refused, says in which line of which file it stands."""
    try:
        yield
    except NamesError as error:
        known = set(scorer.vocab.characters)
        bad = next(index for index, name in enumerate(names) if not known.issuperset(name))
        complaint = str(scorer.vocab.unknown_character_error([names[bad]])).removeprefix("name 0 ")
        raise NamesError(
            f"{source.where}, line {source.first + bad} {complaint}; use --unknown nan to score such names nan"
        ) from error


def _gather(lines: Iterator[bytes], count: int) -> list[bytes]:
    """The next lines: at most `count`, and no more after `CHUNK_BYTES`."""
    raw, size = [], 0
    for line in islice(lines, count):
        raw.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            break
    return raw


def _scorer(options: Namespace) -> Scorer:
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    device = "cuda" if cuda and options.device != "cpu" else "cpu"
    try:
        return Scorer.load(options.model, device=device, remember=True)
    except CheckpointError as error:
        raise UsageError(f"--model {error}") from error


def _fingerprint(options: Namespace, scorer: Scorer, source: Source) -> dict[str, Any]:
    """All that decides about the bytes of an output; a run is only taken up by one that has the same."""
    cuda = scorer.device.type == "cuda"
    model = DEFAULT if options.model == "default" else Path(options.model)
    return {
        "format": options.format,
        "per_position": options.per_position,
        "unknown": options.unknown,
        "sort": options.sort,
        "limit": options.limit,
        "model": hashlib.sha256(model.read_bytes()).hexdigest(),
        "device": torch.cuda.get_device_name(scorer.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **source.identity,
    }


def _check_distinct(options: Namespace) -> None:
    """Refuses an output, or a file beside it, that is the input or the model."""
    if options.output is None:
        return
    output = Path(os.path.realpath(options.output))
    for read in (options.file, options.model):
        for written in (output, *_beside(output)):
            if os.path.exists(read) and written.exists() and os.path.samefile(read, written):
                raise UsageError(f"--output {options.output}: {written} is being read; give another file")


def _beside(output: Path) -> tuple[Path, Path]:
    return output.with_name(f"{output.name}.partial"), output.with_name(f"{output.name}.progress")


def _object(*fields: str) -> str:
    return "{{" + ", ".join(f'"{field}": {{}}' for field in fields) + "}}\n"


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
