"""SFTDataModule: rows, masks, the denominator, order and exact resume, through the real chat format and Lightning."""

from collections import Counter
from itertools import pairwise

import lightning as L
import pytest
import torch

from north_lightning.chat import ChatFormat, NorthTokenizer, train_tokenizer
from north_lightning.data import Conversation, SFTDataModule, SFTSource, write_samples
from north_lightning.data.loader import SFTLoader
from north_lightning.errors import ConfigError, DataError
from north_lightning.losses import cross_entropy_sum, trained_positions
from north_lightning.types import Message, ToolCall, ToolSpec

SHELL = ToolSpec("shell", "Run a command.", {"type": "object", "properties": {"command": {"type": "string"}}})


def plain(number, words=6):
    text = " ".join(f"word{number}x{i}" for i in range(words))
    return Conversation((Message("user", f"question {number}"), Message("assistant", text)), source="chat")


def agentic(number):
    call = ToolCall("0", "shell", {"command": f"cat file{number}.txt"})
    return Conversation(
        (
            Message("user", f"show file {number}"),
            Message("assistant", reasoning="look", tool_calls=(call,)),
            Message("tool", f"contents {number}", tool_call_id="0"),
            Message("assistant", f"It says contents {number}.", reasoning="done"),
        ),
        (SHELL,),
        source="agent",
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["question answer word contents file shows " * 5], [], 400, directory)
    return directory


@pytest.fixture
def make(tmp_path, tokenizer_dir):
    write_samples(tmp_path / "chat.jsonl", [plain(i, 2 + i % 9) for i in range(40)])
    write_samples(tmp_path / "agent.jsonl", [agentic(i) for i in range(25)])

    def build(shares=(None, None), row_tokens=600, **kwargs):
        sources = {
            "chat": SFTSource([tmp_path / "chat.jsonl"], shares[0]),
            "agent": SFTSource([tmp_path / "agent.jsonl"], shares[1]),
        }
        data = SFTDataModule(tokenizer_dir, sources, row_tokens, **kwargs)
        data.setup("fit")
        return data

    return build


def flat(batches):
    return [(b.token_ids.tolist(), b.cu_seqlens.tolist(), b.loss_mask.tolist(), b.num_trained_tokens) for b in batches]


def loader_of(data, accumulate=1, world_size=1, rank=0, num_workers=0):
    return SFTLoader(data.store, data.make_stream(accumulate * world_size), accumulate, world_size, rank, num_workers)


def documents(batches):
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            yield tuple(batch.token_ids[start:end].tolist()), tuple(batch.loss_mask[start:end].tolist())


def test_without_shares_every_document_is_in_exactly_one_row_as_chat_encodes_it(make, tokenizer_dir):
    data = make()
    chat = ChatFormat(NorthTokenizer.load(tokenizer_dir), reasoning=True)
    expected = Counter()
    for sample in [*(plain(i, 2 + i % 9) for i in range(40)), *(agentic(i) for i in range(25))]:
        encoded = chat.encode_conversation(sample.messages, sample.tools, "")
        expected[tuple(encoded.token_ids), tuple(encoded.loss_mask)] += 1
    batches = list(data.train_dataloader())
    assert Counter(documents(batches)) == expected
    assert {name: report.num_samples for name, report in data.reports.items()} == {"chat": 40, "agent": 25}
    assert sum(len(b.sources) for b in batches) == 65
    assert Counter(name for b in batches for name in b.sources) == {"chat": 40, "agent": 25}


def test_rows_are_one_dimensional_bounded_and_never_train_a_first_token(make):
    for batch in make().train_dataloader():
        assert batch.token_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.loss_mask.dtype == torch.bool
        assert batch.token_ids.shape == batch.loss_mask.shape == (int(batch.cu_seqlens[-1]),)
        assert len(batch.token_ids) <= 600
        assert not batch.loss_mask[batch.cu_seqlens[:-1].long()].any()
        assert batch.num_trained_tokens == int(batch.loss_mask.sum())


def test_order_depends_on_the_seed_and_on_nothing_else(make):
    assert flat(make(seed=1).train_dataloader()) == flat(make(seed=1).train_dataloader())
    assert flat(make(seed=1).train_dataloader()) != flat(make(seed=2).train_dataloader())


@pytest.mark.parametrize("shares", [(None, None), (3.0, 1.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_continues_bit_for_bit_after_every_step_and_across_epochs(make, shares, accumulate):
    data = make(shares, row_tokens=1500)
    loader = loader_of(data, accumulate)
    epochs, states = [], {0: loader.state_dict()}
    for _ in range(3):
        for batch in loader:
            epochs.append(batch)
            if len(epochs) % accumulate == 0:
                states[len(epochs)] = loader.state_dict()
    uninterrupted = flat(epochs)
    length = len(loader)
    fresh = make(shares, row_tokens=1500)
    around_the_epochs = {0, accumulate, length - accumulate, length, length + accumulate, 2 * length}
    for position, state in states.items():
        if position not in around_the_epochs:
            continue
        resumed = loader_of(fresh, accumulate)
        resumed.load_state_dict(state)
        remaining = [batch for _ in range(3 - (position - 1) // length if position else 3) for batch in resumed]
        expected = uninterrupted[position:]
        assert flat(remaining)[: len(expected)] == expected


def test_the_rest_of_an_interrupted_epoch_is_exactly_the_rest(make):
    loader = make().train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = make().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == len(loader) - 3
    assert len(list(resumed)) == len(loader)


def test_state_is_small_and_made_of_primitives(make):
    import json

    loader = make().train_dataloader()
    next(iter(loader))
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()
    assert len(json.dumps(loader.state_dict())) < 1000


def test_resume_with_other_data_or_settings_is_refused(make):
    state = make().train_dataloader().state_dict()
    for other in (make(seed=5), make(row_tokens=500), make((1.0, 1.0))):
        with pytest.raises(DataError, match="resume: expected the data"):
            other.train_dataloader().load_state_dict(state)


def test_resume_inside_an_optimizer_step_is_refused(make):
    data = make()
    loader = loader_of(data, 2)
    next(iter(loader))
    with pytest.raises(DataError, match="between optimizer steps"):
        loader_of(data, 2).load_state_dict(loader.state_dict())


def test_ranks_and_accumulation_split_the_same_steps_with_the_same_denominator(make):
    data = make()
    alone = list(loader_of(data, 4))
    two = [list(loader_of(data, 2, world_size=2, rank=rank)) for rank in (0, 1)]
    interleaved = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert flat(interleaved) == flat(alone)
    for step in range(0, len(alone), 4):
        trained = sum(int(batch.loss_mask.sum()) for batch in alone[step : step + 4])
        assert [batch.num_trained_tokens for batch in alone[step : step + 4]] == [trained] * 4


def test_another_split_of_the_same_step_continues_the_same_stream(make):
    data = make()
    loader = loader_of(data, 4)
    uninterrupted = flat(loader)
    loader = loader_of(data, 4)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    ranks = [loader_of(data, 2, world_size=2, rank=rank) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    rest = [batch for pair in zip(*map(list, ranks), strict=True) for batch in pair]
    assert flat(rest) == uninterrupted[4:]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_work_ahead_change_neither_the_rows_nor_the_state(make, num_workers):
    data = make((3.0, 1.0))
    expected = list(loader_of(data, 2))
    loader = loader_of(data, 2, num_workers=num_workers)
    begun = iter(loader)
    first = [next(begun) for _ in range(6)]
    state = loader.state_dict()
    del begun
    resumed = loader_of(data, 1, world_size=2, rank=1)
    resumed.load_state_dict(state)
    assert flat(first) == flat(expected[:6])
    assert flat(resumed) == flat(expected[7::2])


def test_batches_count_the_conversations_of_the_whole_step(make):
    batches = list(loader_of(make(), 3))
    for step in range(0, len(batches), 3):
        rows = batches[step : step + 3]
        assert {row.num_documents for row in rows} == {sum(len(row.sources) for row in rows)}
        for row in rows:
            masks = [mask for _, mask in documents([row])]
            assert row.trained_per_document.tolist() == [sum(mask) for mask in masks]


def test_max_samples_takes_a_part_of_a_source_chosen_by_the_seed(tmp_path, tokenizer_dir):
    write_samples(tmp_path / "chat.jsonl", [plain(i) for i in range(30)])
    chosen = []
    for seed in (0, 0, 1):
        source = SFTSource([tmp_path / "chat.jsonl"], max_samples=10)
        data = SFTDataModule(tokenizer_dir, {"chat": source}, 600, seed=seed)
        data.setup("fit")
        chosen.append(sorted(tokens for tokens, _ in documents(data.train_dataloader())))
        assert data.reports["chat"].dropped == {"max_samples": 20}
        assert len(chosen[-1]) >= 10
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"max_epochs": 2.0}, "expected shares beside it"),
        ({"max_epochs": 0.0, "share": 1.0}, "max_epochs: expected more than 0"),
        ({"max_samples": 0}, "max_samples: expected more than 0"),
        ({"share": 0.0}, "share: expected more than 0"),
    ],
)
def test_caps_that_cannot_work_are_refused(tmp_path, tokenizer_dir, source, message):
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(tokenizer_dir, {"a": SFTSource([], **source)}, 100)


def test_shares_of_trainable_tokens_hold_and_are_reported(make):
    data = make((3.0, 1.0))
    assert data.shares == {"chat": 0.75, "agent": 0.25}
    trained = Counter()
    for batch in data.train_dataloader():
        bounds = batch.cu_seqlens.tolist()
        for name, start, end in zip(batch.sources, bounds, bounds[1:], strict=False):
            trained[name] += int(batch.loss_mask[start:end].sum())
    total = sum(trained.values())
    assert data.make_stream(1).plan_pass().shares["chat"] == pytest.approx(trained["chat"] / total, abs=1e-9)
    assert trained["chat"] / total == pytest.approx(0.75, abs=0.03)


def test_too_long_and_faulty_samples_are_dropped_and_counted(tmp_path, tokenizer_dir):
    bad = Conversation((Message("user", "q"), Message("assistant", "ends in a blank ")))
    write_samples(tmp_path / "mixed.jsonl", [plain(0), plain(1, 500), bad, plain(2)])
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([tmp_path / "mixed.jsonl"])}, 200)
    data.setup("fit")
    assert data.reports["a"].dropped == {"too_long": 1, "erroneous_whitespace": 1}
    assert data.reports["a"].num_samples == 2
    assert data.reports["a"].num_read == 4
    assert data.reports["a"].examples["too_long"][0]["detail"].endswith("a row has 200")


def test_a_source_without_usable_samples_is_refused_with_the_reasons(tmp_path, tokenizer_dir):
    write_samples(tmp_path / "long.jsonl", [plain(1, 500)])
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([tmp_path / "long.jsonl"])}, 100)
    with pytest.raises(DataError, match="a/too_long"):
        data.setup("fit")


def test_shares_for_some_sources_only_are_refused(tmp_path, tokenizer_dir):
    with pytest.raises(ConfigError, match=r"missing for \['b'\]"):
        SFTDataModule(tokenizer_dir, {"a": SFTSource([], 1.0), "b": SFTSource([])}, 100)


def test_validation_rows_hold_every_sample_with_its_own_source(make, tmp_path):
    write_samples(tmp_path / "val.jsonl", [plain(100), agentic(101)])
    data = make(validation_files=[tmp_path / "val.jsonl"])
    batches = data.val_dataloader()
    assert Counter(name for batch in batches for name in batch.sources) == {"chat": 1, "agent": 1}
    assert [b.num_trained_tokens for b in batches] == [int(b.loss_mask.sum()) for b in batches]


def test_lightning_validates_every_row_of_the_one_loader(make, tmp_path):
    write_samples(tmp_path / "val.jsonl", [plain(100 + i) for i in range(30)])
    module = Module()
    rows = []
    module.validation_step = lambda batch, batch_idx: rows.append(batch)
    trainer(tmp_path).validate(module, make(validation_files=[tmp_path / "val.jsonl"]), verbose=False)
    assert sum(len(batch.sources) for batch in rows) == 30
    assert len(rows) > 1


# ---- the loss over packed, accumulated rows -----------------------------------------------------------------------


class Bigram(torch.nn.Module):
    """Next-token model that sees one token: packing cannot change it, so only the normalisation is compared."""

    def __init__(self, vocabulary=512, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(vocabulary, width, dtype=torch.float64)

    def loss_sum(self, batch):
        source, targets = trained_positions(batch.token_ids, batch.cu_seqlens, batch.loss_mask)
        hidden = self.embedding(batch.token_ids)
        return cross_entropy_sum(hidden[source], self.embedding.weight, targets)[0]


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Bigram()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.token_ids.tolist())
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return self.model.loss_sum(batch) / batch.num_trained_tokens * scale

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(tmp_path, **kwargs):
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 1} | kwargs,
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_packed_accumulated_loss_has_the_gradient_of_one_big_batch_of_single_documents(make, tmp_path, accumulate):
    """The mean over all trained tokens of the step, whichever way they are split into rows and micro-batches."""
    data = make()
    module = Module()
    before = module.model.embedding.weight.detach().clone()
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate).fit(module, data)
    step = before - module.model.embedding.weight.detach()  # gradient, with SGD at lr 1
    batches = list(make().train_dataloader())[:accumulate]
    assert len({int(batch.loss_mask.sum()) for batch in batches}) == len(batches), "equal rows would prove nothing"
    reference = Bigram()
    total, count = 0.0, 0
    for tokens, mask in documents(batches):
        logits = reference.embedding(torch.tensor(tokens[:-1])) @ reference.embedding.weight.T
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        total = total + losses[torch.tensor(mask[1:])].sum()
        count += sum(mask[1:])
    (total / count).backward()
    torch.testing.assert_close(step, reference.embedding.weight.grad, rtol=1e-9, atol=1e-12)


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class SaveAtEpochEnd(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, *args):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("where", ["middle of the second epoch", "last step of an epoch", "end of an epoch"])
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 20}])
def test_lightning_resumes_the_stream_exactly(make, tmp_path, where, limit):
    shares = (3.0, 1.0)
    length = len(make(shares).train_dataloader())
    path = tmp_path / "cut.ckpt"
    cut = {"middle of the second epoch": length + length // 2}.get(where, length)
    save = SaveAtEpochEnd(path) if where == "end of an epoch" else SaveAt(cut, path)
    limit = limit if "max_steps" not in limit else limit | {"max_steps": 2 * length + 3}
    whole = Module()
    trainer(tmp_path, callbacks=[save], **limit).fit(whole, make(shares))
    resumed = Module()
    trainer(tmp_path, **limit).fit(resumed, make(shares), ckpt_path=path)
    assert resumed.seen == whole.seen[cut:]
    assert torch.equal(resumed.model.embedding.weight, whole.model.embedding.weight)
