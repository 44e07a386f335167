"""What `llava_trim` refuses in one line, and how it treats requests; called as lmms-eval calls it."""

from collections.abc import Callable

import pytest
from PIL import Image

from llava.errors import InputError
from playground.shapes.world import draw_scene
from tests.clients.conftest import CHECKPOINTS

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: bash scripts/test_clients.sh FOLDER")
CHECKPOINT = str(CHECKPOINTS / "llava-shapes")
TASK = "shapes"


@pytest.fixture(scope="module")
def model() -> object:
    from lmms_eval.models import get_model

    kind = get_model("llava_trim")
    return kind.create_from_arg_string(
        f'pretrained={CHECKPOINT},reduce="TRIM:-1,min_keep=4",device=cpu', {"batch_size": "auto"}
    )


@pytest.fixture
def make_request(model: object) -> Callable[..., object]:
    """Requests of one task; each reads its document anew, as lmms-eval does."""
    from lmms_eval.api.instance import Instance

    model.task_dict = {TASK: {"test": {}}}

    def make(text: str, visuals: list, **arguments: object) -> Instance:
        documents = model.task_dict[TASK]["test"]
        documents[len(documents)] = visuals

        def to_visual(document: list) -> list:
            return [each.copy() if isinstance(each, Image.Image) else each for each in document]

        number = len(documents) - 1
        asked = (text, {"max_new_tokens": 16, **arguments}, to_visual, number, TASK, "test")
        return Instance("generate_until", asked, idx=0, metadata={"task": TASK, "doc_id": number, "repeats": 1})

    return make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto"}, "llava_trim has no option device_map; it has pretrained, reduce, dtype, device"),
        ({"batch_size": "auto:4"}, "batch_size auto:4: expected a whole number from 1 on, or auto"),
        ({"batch_size": 0}, "batch_size 0: expected"),
        ({"conv_template": "vicuna"}, 'no conversation template "vicuna"'),
        ({"dtype": "fp16"}, "dtype fp16: expected float16, bfloat16, float32"),
        ({"reduce": "TRIMM:-1"}, "TRIMM"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict, message: str) -> None:
    from llava.lmms.model import LlavaTrim

    with pytest.raises(InputError, match=message) as raised:
        LlavaTrim(CHECKPOINT, **{"device": "cpu", **options})
    assert "\n" not in str(raised.value)


def test_an_image_that_several_documents_hold_is_encoded_once(
    model: object, make_request: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, other = (draw_scene(5, 7, index)[0] for index in range(2))
    encoded: list[int] = []
    encode = model._model.encode_patches
    monkeypatch.setattr(
        model._model, "encode_patches", lambda images, *rest: encoded.append(len(images)) or encode(images, *rest)
    )
    questions = ("What color is the circle?", "How many objects are there?", "Where is the square?")
    requests = [make_request(text, [image]) for text in questions for image in (picture, other)]
    together = [result.text for result in model.generate_until(requests)]
    assert sum(encoded) == 2
    assert together == [model.generate_until([request])[0].text for request in requests]


def test_each_request_is_searched_for_with_its_own_arguments_and_results_keep_their_order(
    model: object, make_request: Callable[..., object]
) -> None:
    picture = draw_scene(5, 7, 0)[0]
    text = "What color is the circle?"
    lengths = [1, 16, 1, 2]
    results = model.generate_until([make_request(text, [picture], max_new_tokens=length) for length in lengths])
    one, full, again, two = (result.text for result in results)
    assert one == again != two
    assert full.startswith(two) and two.startswith(one)


def test_questions_of_several_images_and_of_none_are_answered(
    model: object, make_request: Callable[..., object]
) -> None:
    pictures = [draw_scene(5, 7, index)[0] for index in range(2)]
    both, none = model.generate_until(
        [make_request("How many objects are there?", pictures), make_request("Name a color.", [])]
    )
    assert both.text and none.text
    assert both.token_counts.image_patches == 128 and none.token_counts.image_patches == 0


def test_what_it_cannot_answer_is_named(model: object, make_request: Callable[..., object]) -> None:
    with pytest.raises(InputError, match="task shapes, document 0 holds str; llava_trim reads images only"):
        model.generate_until([make_request("What happens?", ["clip.mp4"])])
    picture = draw_scene(5, 7, 0)[0]
    with pytest.raises(InputError, match="task shapes, document 1: temperature"):
        model.generate_until([make_request("What color is it?", [picture], temperature=-1)])
    with pytest.raises(InputError, match="task shapes, document 2: the question has 2 <image> placeholders for 1"):
        model.generate_until([make_request("<image> or <image>?", [picture])])
    with pytest.raises(InputError, match="task shapes asks for loglikelihood; llava_trim answers generate_until"):
        model.loglikelihood([make_request("What color is it?", [picture])])
