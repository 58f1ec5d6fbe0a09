"""`mnemic chat`: a conversation whose past is in a memory, kept in a store under a name, turn by turn."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import mnemic
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import console

if TYPE_CHECKING:
    from torch import nn

    from mnemic.sources import Sources

QUIET = "bright_black"
RECALL = "recall"
"""The memory that is there by name: it has no weights that a folder could hold."""
WINDOW = 2048
"""Tokens that a model without a trained memory sees, if it has positions for them."""


def chat(
    model: Annotated[str, typer.Argument(help=CAUSAL, callback=found)],
    memory: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained memory, or recall, which needs none; without, little is remembered."),
    ] = None,
    session: Annotated[str, typer.Option(help="The name that this conversation is kept under.")] = "default",
    store: Annotated[str, typer.Option(help="A path (SQLite), or postgresql+psycopg://...")] = "memories.db",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most probable token.")] = False,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Keep a new session's text with it, so that /memory tells in words.")
    ] = False,
) -> None:
    """Talks with a model whose memory of the conversation is kept in a store. /help lists what else it can do."""
    try:
        base, tokenizer = load(model, memory)
        ways: dict[str, Any] = {"max_new_tokens": max_new_tokens, **({"do_sample": False} if greedy else {})}
        talk = Chat(base, tokenizer, mnemic.SessionStore(store), session, keep_text=keep_text, ways=ways)
    except (OSError, ValueError, mnemic.StoreError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    talk.greet(memory)
    with talk.store:
        for line in lines():
            try:
                if not talk.take(line):
                    break
            except KeyboardInterrupt:  # the third of a turn
                talk.say("\nleft off; what was not saved now, the next turn saves", QUIET)
        if talk.unsaved:
            talk.say(f"Left with something unsaved: session {session!r} is in the store as it was before that.", "red")
            raise typer.Exit(1)


def load_base(name: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # reminders of the model's length, which does not bound a session, amid an answer
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    if torch.cuda.is_available():
        model = model.to("cuda")  # pyright: ignore[reportArgumentType]
    return model, tokenizer


def load(name: str, memory: Path | None) -> tuple[nn.Module, Any]:
    """The model with its memory, with recall, or with a memory that changes nothing; and its tokenizer."""
    import torch

    from mnemic.host.anatomy import trained_positions

    model, tokenizer = load_base(name)
    if memory is not None and memory.name == RECALL and not memory.is_dir():
        window = min(1024, trained_positions(model) or 1024)
        mnemic.attach(model, mnemic.RecallConfig(segment_length=max(1, window // 4), window=window))
    elif memory is not None:
        mnemic.from_pretrained(model, memory)
    else:
        window = min(WINDOW, trained_positions(model) or WINDOW)
        torch.manual_seed(0)  # the same memory in every run, or it would not take its own sessions back
        mnemic.attach(model, mnemic.EMTConfig(segment_length=max(1, window // 4), window=window))
        torch.seed()
    return model, tokenizer


def lines() -> Iterator[str]:
    """What the user types, or what comes through a pipe, until its end. Ctrl-C while typing drops the line."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, `input` then edits lines and recalls them
    while True:
        try:
            yield input("\n> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/exit or Ctrl-D leaves", style=QUIET, highlight=False)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within it the first Ctrl-C only joins the list, so that a step can come to its end; later ones interrupt it."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """One conversation. Every line that is taken ends with the session in the store, or with the reason why not."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        store: mnemic.SessionStore,
        name: str,
        *,
        keep_text: bool = False,
        ways: dict[str, Any] | None = None,
    ) -> None:
        from mnemic.turns import Turns

        self.model, self.tokenizer, self.store, self.name = model, tokenizer, store, name
        self.keep_text, self.turns = keep_text, Turns(tokenizer)
        self.ways = self.turns.ways(model, ways or {})
        self.spent: tuple[int, float] | None = None
        self.found: Sources | None = None
        self.unsaved = False
        self.session = self._stored() or self._new()

    def greet(self, memory: Path | None) -> None:
        """Says what the conversation stands on."""
        kind = mnemic.attached(self.model).config
        if memory is None:
            self.say(
                "No --memory: this one is not trained, so nothing is remembered beyond the window. "
                "`mnemic train` makes one; `--memory recall` needs no training and keeps all that is said.",
                "yellow",
            )
        seen = self.session.stream.seen[0] if self.session.stream is not None else 0
        stands = f"goes on after {seen:,} tokens" if seen else "is new"
        self.say(
            f"Window: the last {self.session.window or seen:,} tokens, as they were. Memory ({kind.kind}): "
            f"{self.session.stream.written[0] if seen and self.session.stream else 0:,} segments of "
            f"{kind.segment_length:,} written.",
            QUIET,
        )
        how = "" if self.turns.template else " The model has no chat template: it continues what you write."
        self.say(f"Session {self.name!r} in {self.store.url} {stands}.{how} /help lists commands.", QUIET)

    def take(self, line: str) -> bool:
        """One line of the user; False when it is the last."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.answer(line)
            return True
        name = line[1:].split()[0] if line[1:].split() else ""
        if name in ("exit", "quit"):
            return False
        command = COMMANDS.get(name)
        if command is None:
            self.say(f"There is no command /{name}; /help lists them.", "red")
        else:
            command(self)
        return True

    # --- talking -----------------------------------------------------------------------------------------------------

    def answer(self, text: str) -> None:
        """Reads a message, writes the answer as it comes, and saves. Ctrl-C ends the answer where it is."""
        import torch

        from mnemic.host.choosing import TextPieces

        begun, said = time.monotonic(), []
        with interrupts() as stop:
            try:
                prompt = self.turns.message(text, first=self.session.is_new)
                pieces = TextPieces(self.tokenizer)
                # the second Ctrl-C, in the middle of a step
                with contextlib.suppress(KeyboardInterrupt), self._watched():
                    for token in self.session.answer(prompt, **self.ways):
                        said.append(token)
                        self._write(pieces.more(torch.tensor(said)))
                        if stop:
                            break
                self._write(pieces.more(torch.tensor(said), last=True) + "\n")
                # an answer that was cut short is closed too: the next turn begins where a turn begins
                if said and (closing := self.turns.closing(said)) is not None:
                    self.session.read(closing)
            except (ValueError, RuntimeError) as error:
                self.say(f"The model could not answer: {error}. What it did not say was not read.", "red")
            self.spent = (len(said), time.monotonic() - begun)
            saved = self.save() if said else False
        if stop and said:
            self.say(f"stopped after {len(said):,} tokens, which were read" + " and saved" * saved, QUIET)
        elif stop:
            self.say("stopped before the first token; your message was not read", QUIET)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes where an answer comes from, where that can be told."""
        if not (self.session.keep_text and mnemic.attached(self.model).memory.keeps):
            yield
            return
        with self.session.sources() as self.found:
            yield

    def save(self, *, overwrite: bool = False) -> bool:
        """Puts the session into the store, unless another version is there; says so if it could not."""
        self.unsaved = True
        try:
            self.store.put(self.name, self.session, overwrite=overwrite)
        except mnemic.Conflict as conflict:
            theirs = f"version {conflict.found} is there" if conflict.found else "it was deleted"
            ours = f"this one came from version {conflict.expected}" if conflict.expected else "this one is new"
            self.say(
                f"Not saved: somebody else has changed session {self.name!r} ({theirs}, {ours}). /reload takes theirs "
                "and drops what was said here since; /overwrite keeps this one and drops theirs.",
                "red",
            )
        except (mnemic.StoreError, mnemic.StateError) as error:
            self.say(f"Not saved: {error}", "red")
        else:
            self.unsaved = False
        return not self.unsaved

    def _stored(self) -> mnemic.Session | None:
        try:
            return self.store.get(self.name, self.model, self.tokenizer)
        except mnemic.NotStored:
            return None

    def _new(self) -> mnemic.Session:
        return mnemic.Session(self.model, self.tokenizer, keep_text=self.keep_text)

    # --- commands ----------------------------------------------------------------------------------------------------

    def memory(self) -> None:
        """what the memory holds: its slots or engrams, and what wrote them"""
        console.print(mnemic.show(self.session))

    def sources(self) -> None:
        """what the last answer was made of, beyond the window"""
        if self.found is None:
            self.say("Nothing beyond the window was noted; that takes --memory recall and --keep-text.", QUIET)
            return
        passages = self.found.passages()
        for each in passages:
            self.say(f"{each['share']:6.1%}  tokens {each['first']:,} to {each['last']:,}", QUIET)
            self.say("        " + " ".join((each["text"] or "").split()))
        if not passages:
            self.say("The last answer saw nothing beyond the window.", QUIET)

    def histograms(self) -> None:
        """the same, and how norms, similarities, ages and lifespans are spread"""
        console.print(mnemic.show(self.session, histograms=True))

    def cost(self) -> None:
        """bytes, tokens and seconds"""
        from mnemic.state import nbytes

        stream = self.session.stream
        if stream is None:
            self.say("Nothing was read yet.", QUIET)
            return
        state, all_bytes = nbytes(stream.state), self.session.nbytes
        waiting = stream.nbytes - state
        self.say(
            f"{stream.seen[0]:,} tokens read, {stream.written[0]:,} segment{'s' * (stream.written[0] != 1)} written\n"
            f"{all_bytes:,} bytes: {state:,} of the memory, {waiting:,} of {stream.counts[0]:,} tokens that wait to be "
            f"written, {all_bytes - state - waiting:,} of the window"
        )
        with contextlib.suppress(mnemic.NotStored):
            entry = self.store.entry(self.name)
            self.say(f"{entry.nbytes:,} bytes in the store, version {entry.version}")
        if self.spent is not None:
            count, seconds = self.spent
            self.say(f"last answer: {count:,} tokens, {seconds / max(1, count):.3f} seconds a token")

    def reset(self) -> None:
        """begin anew under the same name"""
        if self._sure(f"Forget all that session {self.name!r} has read?"):
            stored = self.session.stored
            self.session = self._new()
            self.session.stored = stored
            self.save()
            self.say("The session is new.")

    def forget(self) -> None:
        """remove this session from the store, and begin anew"""
        if not self._sure(f"Remove session {self.name!r} from {self.store.url}?"):
            return
        try:
            entry = self.store.delete(self.name)
            size = f"{entry.nbytes:,} bytes, of which {entry.freed:,} are free now"
            self.say(f"Removed session {entry.name!r}: version {entry.version}, {size}.")
        except mnemic.NotStored:
            self.say(f"Session {self.name!r} is not in the store.")
        except mnemic.StoreError as error:
            self.say(f"Not removed: {error}", "red")
            return
        self.session, self.unsaved = self._new(), False

    def reload(self) -> None:
        """take the session as it is in the store"""
        found = self._stored()
        self.session, self.unsaved = found or self._new(), False
        seen = self.session.stream.seen[0] if self.session.stream is not None else 0
        self.say(f"The session goes on after {seen:,} tokens." if found else "It is not in the store; this one is new.")

    def overwrite(self) -> None:
        """save this session in place of what is in the store"""
        self.save(overwrite=True)

    def help(self) -> None:
        """this list"""
        for name, command in COMMANDS.items():
            self.say(f"/{name:<10} {command.__doc__}")
        self.say(f"/{'exit':<10} leave; every turn is saved already")

    def _sure(self, question: str) -> bool:
        console.print(f"{question} [y/N] ", end="", markup=False, highlight=False)
        try:
            return input().strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return False

    @staticmethod
    def say(text: str, style: str | None = None) -> None:
        """A line of the chat's own."""
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @staticmethod
    def _write(piece: str) -> None:
        # a model may say anything, also what would steer the terminal
        console.out(
            "".join(letter for letter in piece if letter.isprintable() or letter in "\n\t"), end="", highlight=False
        )
        console.file.flush()


_NAMES = ("memory", "sources", "histograms", "cost", "reset", "forget", "reload", "overwrite", "help")
COMMANDS: dict[str, Callable[[Chat], None]] = {name: getattr(Chat, name) for name in _NAMES}
