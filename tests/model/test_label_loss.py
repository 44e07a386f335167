"""The loss over labelled positions alone: the numbers of the whole logits, and no logits for what is ignored."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.label_loss import compute_loss, take_only_loss
from llava.model.splice import Targets
from tests.families import FAMILIES, build_language_model, write_checkpoint

IDS = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 9, 11, 2], [1, IMAGE_TOKEN_INDEX, 8, 6, 0, 0, 0]])
MASK = IDS != 0
LABELS = torch.tensor([[IGNORE_INDEX] * 4 + [9, 11, 2], [IGNORE_INDEX] * 3 + [6] + [IGNORE_INDEX] * 3])
NUM_LABELS = [3, 1]
EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlavaCausalLM]:
    folder = write_checkpoint(tmp_path_factory.mktemp("family") / request.param, request.param)
    model = load_pretrained_model(str(folder), device="cpu", dtype="float32", reduce="TRIM:-1")[1].train()
    model.requires_grad_(True)
    model.get_vision_tower().freeze()
    return model


def learn(model: nn.Module, labels: Tensor = LABELS, **options: object) -> tuple[object, dict[str, Tensor]]:
    """The output of a pass over two samples with images, and the gradients of its loss."""
    model.zero_grad()
    images = torch.linspace(-1, 1, 2 * 3 * 84 * 84).view(2, 3, 84, 84)
    output = model(IDS, attention_mask=MASK, labels=labels, images=images, texts="What is it?", **options)
    output.loss.backward()
    return output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("most_logits", [None, 2**25, 2000, 1], ids=["at once", "one part", "two parts", "row by row"])
def test_loss_and_gradients_are_those_of_the_whole_logits(model, monkeypatch, most_logits):
    whole, expected = learn(model)
    monkeypatch.setattr(model, "most_logits", most_logits)
    output, gradients = learn(model, only_loss=True)
    assert whole.logits.shape[:1] == (2,) and output.logits is None
    torch.testing.assert_close(output.loss, whole.loss, **EXACT)
    assert gradients.keys() == expected.keys() and "model.embed_tokens.weight" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)
    assert output.num_targets.tolist() == NUM_LABELS
    torch.testing.assert_close(output.loss_sums.sum() / sum(NUM_LABELS), whole.loss.detach(), **EXACT)
    alone = torch.where(torch.tensor([[True], [False]]), LABELS, IGNORE_INDEX)
    torch.testing.assert_close(output.loss_sums[0] / NUM_LABELS[0], learn(model, alone)[0].loss.detach(), **EXACT)


def test_the_head_reads_labelled_positions_alone_and_no_more_than_fit_at_a_time(model, monkeypatch):
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, given, made: rows.append(given[0].shape))
    monkeypatch.setattr(model, "most_logits", 2 * model.config.vocab_size)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, labels=LABELS, images=torch.ones(2, 3, 84, 84), texts="?", only_loss=True)
    handle.remove()
    assert rows == [(2, model.config.hidden_size)] * 2


def test_a_batch_without_labels_to_learn_has_loss_0_and_gradients_of_0(model):
    output, gradients = learn(model, torch.full_like(LABELS, IGNORE_INDEX), only_loss=True)
    assert output.loss.item() == 0 and output.num_targets.tolist() == [0, 0]
    assert "lm_head.weight" in gradients or model.config.tie_word_embeddings  # the head takes part on every rank
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_given_number_of_items_divides_the_sum(model):
    whole = learn(model, only_loss=True)[0].loss
    shared = learn(model, only_loss=True, num_items_in_batch=torch.tensor(16))[0].loss
    torch.testing.assert_close(shared * 16, whole * sum(NUM_LABELS))


def test_embeddings_that_are_given_with_labels_have_the_same_loss(model):
    images = torch.ones(2, 3, 84, 84)
    batch = model.embed_prompts(IDS, attention_mask=MASK, labels=LABELS, images=images, texts="?")
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "labels": batch.labels}
    direct = model(inputs_embeds=batch.embeds, only_loss=True, **given)
    torch.testing.assert_close(direct.loss, model(inputs_embeds=batch.embeds, **given).loss, **EXACT)


def test_a_loss_without_labels_is_one_line(model):
    with pytest.raises(InputError, match="only_loss=True: there is no loss without labels"):
        model(IDS, images=torch.ones(2, 3, 84, 84), texts="?", only_loss=True)


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 50, bias=False).bfloat16(), torch.randn(2, 30, 8).bfloat16()
    labels = torch.randint(0, 50, (2, 30))
    loss, _ = compute_loss(head, hidden, Targets.of(labels, torch.device("cpu")), most_rows=7)
    logits = head(hidden[:, :-1]).flatten(0, 1).float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_plain_language_model_takes_it_too_and_answers_other_calls_as_before(name: str):
    model, ids = build_language_model(name), IDS.clamp(min=3)
    whole = model(ids, attention_mask=MASK, labels=LABELS)
    take_only_loss(model)
    output = model(ids, attention_mask=MASK, labels=LABELS, only_loss=True)
    torch.testing.assert_close(output.loss, whole.loss, **EXACT)
    assert output.logits is None and output.num_targets.tolist() == NUM_LABELS
    assert torch.equal(model(ids, attention_mask=MASK, labels=LABELS).logits, whole.logits)


def test_targets_are_the_positions_whose_next_token_is_labelled():
    labels = torch.tensor([[4, 5, IGNORE_INDEX, 6], [IGNORE_INDEX] * 4])
    targets = Targets.of(labels, torch.device("cpu"))
    assert targets.places.tolist() == [0, 2] and targets.labels.tolist() == [5, 6]
    assert targets.counts.tolist() == [2, 0] and targets.owners.tolist() == [0, 0]
