"""What every evaluation shares: where it writes, which model it asks, what decides its figures, and its result."""

import contextlib
import inspect
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from tqdm import tqdm

from inform_rm.errors import InputError
from inform_rm.eval.settings import RowSettings
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer, as_scorer
from inform_rm.util.files import atomic_write_bytes, check_output_directory, versions, write_json
from inform_rm.util.journal import RewardJournal
from inform_rm.util.page import Block, Heading, Image, Page, Table, figure_png, settings_table
from inform_rm.util.processes import is_main_process

RESULT_FILE = "result.json"
JOURNAL_FILE = "rewards.partial"


def unwritten(**options: Any) -> Any:
    """A field of a `Result` that stands in none of its JSON: what plots and tables of single rows are drawn from."""
    return field(repr=False, compare=False, metadata={"written": False}, **options)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation found, and what it was computed with.

    A subclass adds its figures as fields, which JSON can hold, and says ``title`` (one line), `table`, `figure` and
    what is on the page. A field whose default is ``None`` is absent from the JSON where it was not measured.

    Attributes:
        settings: those that were given, by name.
        seed: of all that was random.
        versions: of Python and the packages that decide a result.
    """

    settings: dict[str, Any]
    seed: int
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        found = {each: getattr(self, each.name) for each in fields(self) if each.metadata.get("written", True)}
        return {each.name: value for each, value in found.items() if value is not None or each.default is MISSING}

    if TYPE_CHECKING:  # a subclass may have it as a field, which an inherited property would forbid
        title: ClassVar[Any]

    def table(self) -> Table:
        """The main figures."""
        raise NotImplementedError

    def _blocks(self) -> list[Block]:
        """What the page shows above the settings; images are named, so that they can lie beside a Markdown page."""
        raise NotImplementedError

    def page(self) -> Page:
        """All that a reader should see."""
        return Page(self.title, [*self._blocks(), Heading("Settings"), self.settings_table()])

    def figure(self) -> Figure:
        """The main figures as a drawing."""
        raise NotImplementedError

    def settings_table(self) -> Table:
        """What it was computed with: settings, seed, the model's weights and versions."""
        fingerprint = getattr(self, "model_fingerprint", None)
        weights = {} if fingerprint is None else {"model fingerprint": fingerprint[:12]}
        return settings_table(self.settings, {"seed": self.seed}, weights, self.versions)

    def _drawn(self, caption: str, file: str) -> Image:
        return Image(figure_png(self.figure()), caption, file)

    def _repr_html_(self) -> str:
        return replace(self.table(), caption=self.title).html()

    def save(self, folder: str | Path, files: Mapping[str, bytes | str] | None = None) -> None:
        """Write ``files`` (content by name), the page with its images, and at last ``result.json``, each whole."""
        folder, page = Path(folder), self.page()
        images = {block.file: block.png for block in page.blocks if isinstance(block, Image) and block.file}
        content = {**(files or {}), **images, "result.md": page.markdown(), "result.html": page.html()}
        for name, value in content.items():
            atomic_write_bytes(folder / name, value.encode() if isinstance(value, str) else value)
        write_json(folder / RESULT_FILE, self.to_dict())  # last: its presence says that the rest is complete


@dataclass(frozen=True, kw_only=True)
class ModelResult(Result):
    """A `Result` about one model.

    Attributes:
        model: its folder, Hub id or class.
        model_fingerprint: of its weights in the type in which they were asked.
        tokenizer_fingerprint: of its tokenizer.
    """

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str


Settings = TypeVar("Settings")


def settings_of(
    kind: type[Settings], options: Mapping[str, Any], rest: Callable[..., Any] = RewardScorer
) -> tuple[Settings, dict[str, Any]]:
    """Keywords that are fields of ``kind`` as such settings, and the others, which are those of ``rest``."""
    own = set(inspect.signature(kind).parameters)
    of_rest = set(inspect.signature(rest).parameters) - {"model", "tokenizer", "endpoint"}
    unknown = sorted(set(options) - own - of_rest)
    if unknown:
        raise InputError(f"{unknown[0]}: no setting of this name; expected one of {', '.join(sorted(own | of_rest))}.")
    settings = kind(**{name: value for name, value in options.items() if name in own})
    return settings, {name: value for name, value in options.items() if name not in own}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a row."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def parquet(columns: Mapping[str, Any]) -> bytes:
    """A Parquet file of these columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """The bars of `datasets`, which it shows unless told otherwise, only where they are wanted."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


class Frame:
    """The steps of an evaluation of one model that do not depend on what is evaluated.

    The folder for the results is checked before anything else; an ``output`` of ``None`` keeps them in memory. Of
    several processes that split their work only the main one shows progress, and writes.
    """

    def __init__(self, model: Any, output: str | Path | None, tokenizer: Any, scorer_options: dict, progress: bool):
        self.folder = None if output is None else check_output_directory(output)
        self.scorer = as_scorer(model, tokenizer, scorer_options)
        self._writes = not self.scorer.split_over_processes or is_main_process()
        self.progress = progress and self._writes
        self._journals: list[Path] = []

    @cached_property
    def identity(self) -> dict[str, Any]:
        """`RewardScorer.identity`, computed once."""
        return self.scorer.identity()

    def described(self, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The fields of `ModelResult`; settings that are ``None`` were not given. Those of the scorer join them."""
        settings = {**settings, "max_length": self.scorer.max_length, "dtype": self.identity["dtype"]}
        return {
            "model": self.scorer.name,
            "model_fingerprint": self.identity["model"],
            "tokenizer_fingerprint": self.identity["tokenizer"],
            "settings": {name: value for name, value in settings.items() if value is not None},
            "seed": seed,
        }

    def described_with(
        self, settings: RowSettings, records: Sequence[Mapping[str, Any]], **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a `ModelResult` with ``data``, records of the sources; and what `journal` takes as a run."""
        given = {**more, "data": [record["source"] for record in records], **settings.to_dict()}
        described = {**self.described(given, settings.seed), "data": list(records)}
        fingerprints = [record["fingerprint"] for record in records]
        return described, {"data": fingerprints, "settings": described["settings"], "seed": settings.seed}

    @contextlib.contextmanager
    def journal(self, name: str, run: Mapping[str, Any]) -> Iterator[RewardJournal | None]:
        """A journal in the folder for as long as rewards are computed; ``None`` without a folder.

        It stays after an error, for the next call, until `finish`. ``run`` is what decides the rewards beside the
        model; a file of another one is refused.
        """
        if self.folder is None:
            yield None
            return
        path = self.folder / name
        self._journals.append(path)
        journal = RewardJournal(path, {**self.identity, **run}, self.scorer.split_over_processes)
        with contextlib.closing(journal):
            yield journal

    def rewards(
        self,
        chunks: Iterable[tuple[Sequence[Sequence[int]], Sequence[int]]],
        num_responses: int,
        run: Mapping[str, Any],
        where: Callable[[int], str],
    ) -> np.ndarray:
        """Rewards ``(num_responses,)`` in order, float32; those that the journal holds are not computed again.

        Args:
            chunks: token ids of responses with their prompts, and the prompts' lengths in tokens; responses of one
                chunk are sorted by length together and share the computation of equal prompts.
            num_responses: in all chunks together.
            run: see `journal`; its entry i is response i.
            where: names response i in an error.
        """
        rewards = np.full(num_responses, np.nan, dtype=np.float32)
        first = 0
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(self.journal(JOURNAL_FILE, run))
            for entry, reward, _ in () if journal is None else journal.finished():
                rewards[entry] = reward
            done = int(np.isfinite(rewards).sum())
            bar = stack.enter_context(
                tqdm(total=num_responses, initial=done, unit="response", desc="evaluate", disable=not self.progress)
            )
            for sequences, prompt_lengths in chunks:
                todo = [place for place in range(len(sequences)) if np.isnan(rewards[first + place])]
                left = [sequences[place] for place in todo], [prompt_lengths[place] for place in todo]
                try:
                    for places, values, _ in self.scorer.iter_scores(*left):
                        entries = [first + todo[place] for place in places]
                        rewards[entries] = values.numpy()
                        if journal is not None:
                            journal.add(entries, values.tolist())
                        bar.update(len(places))
                except NonFiniteRewardError as error:
                    entry = first + todo[error.row]
                    raise NonFiniteRewardError(entry, error.value, where(entry)) from error
                first += len(sequences)
        return rewards

    def finish(self, result: Result, files: Mapping[str, bytes | str] | None = None) -> None:
        """Write the result where there is a folder and this process writes; its journals are no longer needed."""
        if self.folder is not None and self._writes:
            result.save(self.folder, files)
            for path in self._journals:
                path.unlink(missing_ok=True)
