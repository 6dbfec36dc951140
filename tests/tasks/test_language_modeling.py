"""Tests of language modelling: sampling, generation in pieces, scores, training steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.configs import to_json
from zoo.data.text import START, StreamBatch, encode_bytes
from zoo.errors import DataError, ZooError
from zoo.families.cached_transformers import CachedTransformerLM, CachedTransformerLMConfig
from zoo.tasks.language_modeling import LanguageModel, sample_token

SEGMENT = 8
PROMPT = "ROMEO:\nBut soft"


def model_of(memory: Any = "grc", seed: int = 0) -> LanguageModel:
    """A tiny model with random weights everywhere, whose output is far from uniform."""
    base = CachedTransformerLMConfig()
    config = dataclasses.replace(
        base,
        dim=16,
        depth=2,
        num_heads=2,
        segment=SEGMENT,
        memory=memory,
        memory_length=SEGMENT,
        grc=dataclasses.replace(base.grc, segment=SEGMENT, slots=4),
    )
    module = LanguageModel(network=config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.7 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))
        module.network.head.weight.mul_(3.0)
    return module


@pytest.fixture(params=["grc", "xl", "none"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return model_of(request.param)


# --- sampling, against probabilities from their definition ---------------------------------------


def probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """Of each token, one after the other, from the likeliest on."""
    weight = np.exp(np.array(logits) / temperature - max(logits) / temperature)
    p = weight / weight.sum()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    kept = order if top_k is None else order[:top_k]
    if top_p is not None:
        total, nucleus = sum(p[token] for token in kept), []
        reached = 0.0
        for token in kept:
            nucleus.append(token)
            reached += p[token] / total
            if reached >= top_p:
                break
        kept = nucleus
    chosen = np.zeros_like(p)
    chosen[kept] = p[kept] / p[kept].sum()
    return chosen


# Distances between sums of these are far above rounding, so that no tie and no edge of a nucleus
# depends on it.
LOGITS = [0.3, -1.2, 2.1, 0.9, -0.4, 1.7]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 6, 9])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.83, 1.0])
def test_tokens_are_drawn_with_their_exact_probabilities(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    draws = 20_000
    expected = probabilities(LOGITS, temperature, top_k, top_p)
    drawn = sample_token(
        torch.tensor(LOGITS).expand(draws, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )
    counts = np.bincount(drawn.numpy(), minlength=len(LOGITS))
    possible = expected > 0
    assert not counts[~possible].any()
    if possible.sum() > 1:
        test = scipy.stats.chisquare(counts[possible], draws * expected[possible])
        assert test.pvalue > 1e-4
    else:
        assert counts[possible] == draws


@given(data=st.data(), batch=st.integers(1, 4))
def test_rows_are_drawn_each_from_its_own_logits(data: st.DataObject, batch: int) -> None:
    # A gap of 60 makes one token certain.
    winners = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    logits = 60.0 * F.one_hot(torch.tensor(winners), 5).float()
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}):
        arguments: dict[str, Any] = {"top_k": None, "top_p": None, **options}
        drawn = sample_token(logits, temperature=1.0, generator=None, **arguments)
        assert drawn.tolist() == winners


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_of_tokens_that_are_as_likely_no_more_than_k_are_kept(top_k: int) -> None:
    logits = torch.zeros(400, 6)
    logits[:, 4] = 1.0
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits, temperature=1.0, top_k=top_k, top_p=None, generator=generator)
    assert 4 in drawn
    assert len(set(drawn.tolist())) == top_k


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = torch.randn(50, 9)
    drawn = sample_token(logits, temperature=0, top_k=None, top_p=None, generator=None)
    assert drawn.tolist() == [max(range(9), key=row.__getitem__) for row in logits.tolist()]


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-38, 1e-37, 1e-30])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_smallest_temperatures_are_greedy(temperature: float, options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"top_k": None, "top_p": None, "generator": None, **options}
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 40
    drawn = sample_token(logits, temperature=temperature, **arguments)
    assert drawn.tolist() == logits.argmax(-1).tolist()


# --- generation ----------------------------------------------------------------------------------


@torch.no_grad()
def naive_greedy(model: LanguageModel, before: list[int], number: int) -> list[int]:
    """One long forward pass over all that was written, for every byte anew."""
    written: list[int] = []
    for _ in range(number):
        logits, _ = model.network(torch.tensor([before + written]))
        written.append(int(logits[0, -1].argmax()))
    return written


def test_greedy_generation_in_pieces_equals_one_pass_over_the_text(model: LanguageModel) -> None:
    before = [START, *PROMPT.encode()]
    expected = naive_greedy(model, before, 3 * SEGMENT)
    text = bytes(expected).decode("utf-8", "replace")
    assert model.generate(PROMPT, max_new_tokens=3 * SEGMENT, temperature=0) == text
    stream = model.stream(PROMPT, max_new_tokens=3 * SEGMENT, temperature=0)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.text == text
    assert iter(stream) is stream
    assert next(stream, None) is None
    # The state has seen all of it: what comes next is what a pass over everything says.
    assert stream.state.position == (len(before) + len(expected)) % SEGMENT
    with torch.no_grad():
        next_logits, _ = model.network(torch.tensor([[65]]), stream.state)
        whole, _ = model.network(torch.tensor([[*before, *expected, 65]]))
    torch.testing.assert_close(next_logits[0, -1], whole[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 5, SEGMENT])
def test_generation_goes_on_after_a_stream(model: LanguageModel, number: int) -> None:
    stream = model.stream(PROMPT, max_new_tokens=number, temperature=0)
    list(stream)
    before = [START, *PROMPT.encode()]
    written = naive_greedy(model, before, number)
    expected = naive_greedy(model, [*before, *written, *b" And"], 12)
    found = model.generate(" And", max_new_tokens=12, temperature=0, state=stream.state)
    assert found == bytes(expected).decode("utf-8", "replace")
    # The state is a value: a second continuation finds it as the first did.
    assert model.generate(" And", max_new_tokens=12, temperature=0, state=stream.state) == found


def test_a_stream_can_be_left_at_any_byte_and_gone_on_with(model: LanguageModel) -> None:
    with torch.no_grad():
        model.network.head.weight[128:] = 0.0  # a character is a byte, and a piece of text
    before, total = [START, *PROMPT.encode()], 2 * SEGMENT
    text = bytes(naive_greedy(model, before, total)).decode()
    whole = model.stream(PROMPT, max_new_tokens=total, temperature=0)
    for count in range(total + 1):
        assert whole.text == text[:count]
        left = model.stream(PROMPT, max_new_tokens=total, temperature=0)
        for _ in range(count):
            next(left)
        for stream in (left, whole):  # looked at once, and after every byte
            assert stream.state.position == (len(before) + count) % SEGMENT
            with torch.no_grad():
                found, _ = model.network(torch.tensor([[65]]), stream.state)
                expected, _ = model.network(torch.tensor([[*before, *text[:count].encode(), 65]]))
            torch.testing.assert_close(found[0, -1], expected[0, -1], rtol=1e-4, atol=1e-4)
        next(whole, None)
    assert whole.text == text


def test_a_model_in_training_writes_and_scores_as_any_other() -> None:
    model = model_of()
    expected = model.generate(PROMPT, max_new_tokens=20, seed=1), model.predict(PROMPT)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    stream = model.stream(PROMPT, max_new_tokens=20, seed=1)
    assert next(stream)
    assert all(part.training for part in model.modules()), "also while a text is written"
    assert (stream.text + "".join(stream), model.predict(PROMPT)) == expected


def test_a_seed_makes_the_text_repeatable_and_the_global_state_is_left_alone() -> None:
    model = model_of()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate(PROMPT, max_new_tokens=40, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert model.generate(PROMPT, max_new_tokens=40, seed=1) == first
    assert model.generate(PROMPT, max_new_tokens=40, seed=2) != first
    streams = [model.stream(PROMPT, max_new_tokens=40, seed=1) for _ in range(2)]
    both = [a + b for a, b in zip(*streams, strict=True)]
    assert "".join(piece[: len(piece) // 2] for piece in both) == first, "streams share nothing"


def test_without_a_seed_the_global_generator_decides() -> None:
    model = model_of()
    torch.manual_seed(5)
    first = model.generate(PROMPT, max_new_tokens=40)
    assert model.generate(PROMPT, max_new_tokens=40) != first
    torch.manual_seed(5)
    assert model.generate(PROMPT, max_new_tokens=40) == first


def test_sampling_options_reach_the_sampler() -> None:
    model = model_of()
    greedy = model.generate(PROMPT, max_new_tokens=30, temperature=0)
    assert model.generate(PROMPT, max_new_tokens=30, top_k=1, seed=3) == greedy
    assert model.generate(PROMPT, max_new_tokens=30, top_p=1e-6, seed=3) == greedy
    assert model.generate(PROMPT, max_new_tokens=30, temperature=1e-4, seed=3) == greedy
    assert model.generate(PROMPT, max_new_tokens=30, temperature=3.0, seed=3) != greedy


class Script(nn.Module):
    """A network that writes given bytes, whatever it reads."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content

    def forward(self, tokens: Tensor, state: int | None) -> tuple[Tensor, int]:
        position = 0 if state is None else state
        byte = self.content[position % len(self.content)]
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[:, -1, byte] = 100.0
        return logits, position + 1


def scripted(content: bytes) -> LanguageModel:
    model = model_of("none")
    model.network = Script(content)  # type: ignore[assignment]
    return model


def test_characters_of_several_bytes_come_whole() -> None:
    text = "é€😀a"
    stream = scripted(text.encode()).stream("x", max_new_tokens=len(text.encode()))
    assert list(stream) == ["é", "€", "😀", "a"]
    assert stream.text == text


@pytest.mark.parametrize("number", range(1, 10))
def test_a_character_that_is_cut_off_shows_as_replaced(number: int) -> None:
    content = "é€😀".encode()[:number]
    expected = content.decode("utf-8", "replace")
    assert scripted("é€😀".encode()).generate("x", max_new_tokens=number) == expected


def test_a_prompt_of_several_bytes_to_a_character() -> None:
    model = model_of()
    prompt = "é€😀"
    expected = naive_greedy(model, [START, *prompt.encode()], 10)
    found = model.generate(prompt, max_new_tokens=10, temperature=0)
    assert found == bytes(expected).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "The prompt is empty; give at least one character to continue from."),
        ({"prompt": 3}, "The prompt must be a text, got 3."),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0."),
        ({"max_new_tokens": -3}, "max_new_tokens must be at least 1, got -3."),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5."),
        ({"max_new_tokens": "9"}, "max_new_tokens must be a whole number, got '9'."),
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or positive, got -0.1."),
        ({"temperature": math.nan}, "temperature must be 0 (greedy) or positive, got nan."),
        ({"temperature": math.inf}, "temperature must be 0 (greedy) or positive, got inf."),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'."),
        ({"temperature": None}, "temperature must be a number, got None."),
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"top_k": 1.0}, "top_k must be a whole number, got 1.0."),
        ({"top_k": True}, "top_k must be a whole number, got True."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan."),
        ({"top_p": "most"}, "top_p must be a number, got 'most'."),
        ({"seed": "one"}, "seed must be a whole number, got 'one'."),
        ({"seed": 2**63}, f"seed must be from 0 to 2**63 - 1, got {2**63}."),
        ({"seed": -1}, "seed must be from 0 to 2**63 - 1, got -1."),
        ({"state": "x"}, "state must be the state of an earlier TextStream, or None, got 'x'."),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPT, **options}
    model = model_of("none")
    for call in (model.generate, model.stream):
        with pytest.raises(ZooError) as caught:
            call(**arguments)
        assert str(caught.value) == message


def test_the_smallest_and_largest_options_are_allowed() -> None:
    model = model_of("none")
    options: dict[str, Any] = {"temperature": 1, "top_k": 1_000, "top_p": 1, "seed": 2**63 - 1}
    assert len(model.generate("x", max_new_tokens=1, **options)) == 1


def test_numbers_of_arrays_are_numbers() -> None:
    model = model_of("none")
    plain: dict[str, Any] = {"max_new_tokens": 9, "top_k": 50, "seed": 3, "temperature": 0.5}
    arrays = {name: np.array(value)[()] for name, value in plain.items()}
    arrays["temperature"] = np.float32(0.5)
    assert type(arrays["seed"]) is np.int64
    assert model.generate(PROMPT, **arrays) == model.generate(PROMPT, **plain)


# --- scores --------------------------------------------------------------------------------------


@torch.no_grad()
def naive_log_likelihood(model: LanguageModel, content: bytes) -> float:
    """From one pass over the text, by the definition of the softmax in float64."""
    logits, _ = model.network(torch.tensor([[START, *content[:-1]]]))
    total = 0.0
    for row, byte in zip(logits[0].double().numpy(), content, strict=True):
        total += row[byte] - math.log(np.exp(row - row.max()).sum()) - row.max()
    return float(total)


@pytest.mark.parametrize(
    "text",
    ["x", "seven b", "eight by", "and nine!", "x" * 40, "é€😀 and more of it", "a\udce9b\n"],
)
def test_predict_is_the_cross_entropy_computed_by_hand(model: LanguageModel, text: str) -> None:
    content = text.encode("utf-8", "surrogateescape")
    (score,) = model.predict(text)
    expected = naive_log_likelihood(model, content)
    assert (score.text, score.n) == (text, len(content))
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert score.nats_per_byte == pytest.approx(-expected / len(content), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(-expected / len(content) / math.log(2), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-expected / len(content)), rel=1e-4)


def test_a_fresh_model_takes_all_bytes_for_equally_likely() -> None:
    (score,) = LanguageModel(network=model_of().config).eval().predict("Romeo, Romeo")
    assert score.perplexity == pytest.approx(256.0, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(8.0, rel=1e-5)


def test_texts_are_scored_each_on_its_own(model: LanguageModel) -> None:
    texts = ["one text", "and another, longer one"]
    together = model.predict(texts)
    assert together == [model.predict(text)[0] for text in texts]
    assert together[::-1] == model.predict(texts[::-1])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "predict got an empty text; there is nothing to score."),
        (["fine", ""], "predict got an empty text; there is nothing to score."),
        ([], "predict got no texts."),
        ((), "predict got no texts."),
        ([3], "predict takes texts, got int."),
        ([b"bytes"], "predict takes texts, got bytes."),
        (3, "predict takes texts, got int."),
    ],
)
def test_what_cannot_be_scored(texts: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        model_of("none").predict(texts)
    assert str(caught.value) == message


# --- training ------------------------------------------------------------------------------------


def batch_of(streams: int, length: int, seed: int, reset: list[bool] | None = None) -> StreamBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (streams, length + 1), generator=generator)
    return StreamBatch(tokens, torch.tensor(reset or [False] * streams))


def naive_loss(model: LanguageModel, tokens: Tensor, last: int) -> float:
    """Mean over the last targets of each row, by the definition, from one pass over all of it."""
    with torch.no_grad():
        logits, _ = model.network(tokens[:, :-1])
    logp = logits.double().log_softmax(-1)
    picked = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    return -float(picked[:, -last:].mean())


@pytest.fixture
def unlogged(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The model outside of a trainer."""
    monkeypatch.setattr(model, "log", lambda *arguments, **options: None)
    return model


def test_the_loss_of_a_step_carries_the_memory_on(unlogged: LanguageModel) -> None:
    first, second = batch_of(3, 2 * SEGMENT, 1), batch_of(3, 2 * SEGMENT, 2)
    second.tokens[:, 0] = first.tokens[:, -1]
    loss = unlogged.training_step(first, 0)
    assert float(loss) == pytest.approx(naive_loss(unlogged, first.tokens, 16), rel=1e-5)
    whole = torch.cat((first.tokens, second.tokens[:, 1:]), 1)
    loss = unlogged.training_step(second, 1)
    assert float(loss) == pytest.approx(naive_loss(unlogged, whole, 16), rel=1e-5)


def test_streams_that_are_reset_start_afresh(unlogged: LanguageModel) -> None:
    first, second = batch_of(2, SEGMENT, 1), batch_of(2, SEGMENT, 2, reset=[True, True])
    unlogged.training_step(first, 0)
    loss = unlogged.training_step(second, 1)
    assert float(loss) == pytest.approx(naive_loss(unlogged, second.tokens, SEGMENT), rel=1e-5)


def test_an_epoch_starts_with_fresh_streams(
    unlogged: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "current_epoch", 0)
    monkeypatch.setattr(LanguageModel, "global_rank", 0)
    first, second = batch_of(2, SEGMENT, 1), batch_of(2, SEGMENT, 2)
    unlogged.training_step(first, 0)
    unlogged.on_train_epoch_start()
    loss = unlogged.training_step(second, 0)
    assert float(loss) == pytest.approx(naive_loss(unlogged, second.tokens, SEGMENT), rel=1e-5)


def test_no_gradient_flows_into_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("grc")
    monkeypatch.setattr(model, "log", lambda *arguments, **options: None)
    first, second = batch_of(2, SEGMENT, 1), batch_of(2, SEGMENT, 2)
    first.tokens.fill_(7)  # a byte that the second batch is made not to have
    second.tokens[second.tokens == 7] = 8
    model.training_step(first, 0)
    model.zero_grad()
    model.training_step(second, 1).backward()
    gradient = model.network.embedding.weight.grad
    assert gradient is not None
    assert not gradient[7].any()
    assert gradient[second.tokens[:, :-1].unique()].any(1).all()


@pytest.mark.parametrize(("every", "reaches"), [(1, False), (None, True)])
def test_gradients_through_the_memory_within_a_step(
    monkeypatch: pytest.MonkeyPatch, every: int | None, reaches: bool
) -> None:
    model = model_of("grc")
    model.detach_every = every
    monkeypatch.setattr(model, "log", lambda *arguments, **options: None)
    # Byte 7 only stands in the first segment, and only the losses of the second are looked at.
    batch = batch_of(2, 2 * SEGMENT, 1)
    batch.tokens[batch.tokens == 7] = 8
    batch.tokens[:, :SEGMENT] = 7
    real = F.cross_entropy

    def later_half(logits: Tensor, targets: Tensor) -> Tensor:
        n = 2 * SEGMENT
        rows = [i for i in range(len(targets)) if i % n >= SEGMENT]
        return real(logits[rows], targets[rows])

    monkeypatch.setattr(F, "cross_entropy", later_half)
    model.training_step(batch, 0).backward()
    gradient = model.network.embedding.weight.grad
    assert gradient is not None
    assert bool(gradient[7].any()) == reaches


def test_the_validation_loss_counts_each_byte_once(
    unlogged: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of(3, SEGMENT, 1), batch_of(1, 3, 2)]  # the last block is shorter
    logged: list[Callable[[], Tensor]] = []
    monkeypatch.setattr(unlogged, "log", lambda name, value, **options: logged.append(value))
    with torch.no_grad():
        for index, batch in enumerate(batches):
            unlogged.validation_step(batch, index)
    sums = [naive_loss(unlogged, b.tokens, 99) * b.tokens[:, 1:].numel() for b in batches]
    expected = sum(sums) / sum(b.tokens[:, 1:].numel() for b in batches)
    assert float(unlogged.val_loss.compute()) == pytest.approx(expected, rel=1e-5)
    assert logged == [unlogged.val_loss] * 2


def test_what_a_checkpoint_needs_to_know() -> None:
    model = model_of("none")
    assert to_json(model.preprocessing) == {"tokenizer": "bytes", "start": 10}
    assert set(model.head_parameters) <= {name for name, _ in model.network.named_parameters()}
    assert isinstance(model.network, CachedTransformerLM)
    assert list(encode_bytes("\n")) == [model.preprocessing.start]
