"""Whether token reduction reads the queries of a training set whole, found out before any weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava.errors import InputError
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.query_pooling import split_query
from llava.model.multimodal_encoder.text_reader import TextReader
from llava.model.token_reduction import CONFIG_KEY, TEXT, read_training_reduction
from llava.prompt import POOLED_TURNS
from llava.train.dataset import TextFormat
from llava.train.flags import ModelArguments
from llava.train.preflight import SAMPLED_RECORDS, name_records, sample
from llava.train.store import Record
from llava.train.targets import choose_query, render


@dataclass(frozen=True)
class CutQueries:
    """What a text half does not read of a training set.

    Attributes:
        context: the most tokens that it reads.
        num_read: sampled records with an image.
        num_dialogues: of these, records of several questions.
        names: records whose query is cut.
        num_cut_dialogues: of these, records of several questions.
    """

    context: int
    num_read: int
    num_dialogues: int
    names: tuple[str, ...]
    num_cut_dialogues: int

    def describe(self) -> str:
        """Describe it for people, in a line of the preflight."""
        line = (
            f"  queries cut at {self.context} tokens: {name_records(self.names)} (of {self.num_read} with an image; "
            f"{self.num_cut_dialogues} of {self.num_dialogues} with several questions)"
        )
        return line + (f"; --mm_vision_token_reduce_query {POOLED_TURNS} reads them whole" if self.names else "")


def find_reader(model_args: ModelArguments) -> TextReader | None:
    """Read the tokenizer of the tower's text half; None where no reduction reads text, or it cannot be read."""
    reducer = read_training_reduction(getattr(model_args, CONFIG_KEY)).middle.before
    if model_args.vision_tower is None or reducer is None or TEXT not in reducer.needs:
        return None
    try:
        return build_named_tower(model_args.vision_tower, folder=model_args.model_name_or_path).text_reader
    except InputError:
        return None  # loading the tower says why


def find_cut_queries(records: Sequence[Record], text_format: TextFormat, reader: TextReader) -> CutQueries:
    """Find the records whose query the text half does not read to its end, in the sample of the preflight.

    Args:
        records: the training set.
        text_format: template, and which text is the query.
        reader: of the tower's text half.
    """
    read, pieces = [], []
    for record in (each for each in sample(records, SAMPLED_RECORDS) if each.images):
        try:
            rendered = render(record.turns, text_format.template, text_format.placeholder)
        except InputError:
            continue  # counted among the broken ones
        query = choose_query(record.turns, rendered, text_format.query_source)
        read.append(record)
        pieces.append(split_query(query, reader) if text_format.query_source == POOLED_TURNS else [query])
    counts = iter(reader.count([piece for own in pieces for piece in own]))
    is_cut = [max(next(counts) for _ in own) > reader.context for own in pieces]
    is_dialogue = [len(record.turns[::2]) > 1 for record in read]
    return CutQueries(
        context=reader.context,
        num_read=len(read),
        num_dialogues=sum(is_dialogue),
        names=tuple(record.name for record, cut in zip(read, is_cut, strict=True) if cut),
        num_cut_dialogues=sum(cut and several for cut, several in zip(is_cut, is_dialogue, strict=True)),
    )
