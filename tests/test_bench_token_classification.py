from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peftkit_bench.metrics import METRICS
from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks.contract import Prepared, RowError, Split
from peftkit_bench.tasks.token_classification import TokenClassification, bio, entities, entity_counts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

TASK = TokenClassification()
PLAIN = TokenClassification(metric="token accuracy")
ROW = {"tokens": ["Ada", "Lovelace", "left", "London"], "tags": ["B-person", "I-person", "O", "B-city"]}


def word_pieces(max_tokens: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer of BERT's kind, a piece a letter."""
    letters = [chr(97 + i) for i in range(26)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{each}" for each in letters)]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_max_length=max_tokens)


def bytes_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer of GPT-2's kind: the space belongs to the word after it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["Ada Lovelace left London"] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


class Oracle(nn.Module):
    """Gives the tag that `tags` has for the token's id."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scores = nn.Embedding(100, count)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.scores(input_ids))


def prepared(task: TokenClassification, rows: Sequence[dict[str, Any]], tokenizer: Any) -> Prepared:
    read = tuple(task.read(row) for row in rows)
    facts = task.facts({"train": read})
    encoded = tuple(task.encode(tokenizer, row, facts) for row in read)
    split = Split(rows=read, encoded=encoded, groups=tuple(range(len(read))))
    return Prepared(folder="", backbone={}, data={}, facts=facts, splits={"test": split}, padding=0)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-x I-x O", [(1, 3, "x")]),
        ("B-x B-x I-x", [(0, 1, "x"), (1, 3, "x")]),
        ("I-x I-x O I-y", [(0, 2, "x"), (3, 4, "y")]),  # IOB1
        ("B-x I-y I-y", [(0, 1, "x"), (1, 3, "y")]),  # another type begins another entity
        ("O I-a-b", [(1, 2, "a-b")]),
        ("S-x S-x B-y E-y I-y", [(0, 1, "x"), (1, 2, "x"), (2, 4, "y"), (4, 5, "y")]),
        ("U-x B-y L-y", [(0, 1, "x"), (1, 3, "y")]),
        ("O O", []),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags: str, expected: list[Any]) -> None:
    assert entities(tags.split()) == expected


def test_entities_agree_with_seqeval_on_random_tags() -> None:
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    generator = random.Random(0)
    tags = ["O", *(f"{p}-{t}" for p in "BIES" for t in ("x", "y"))]
    for length in range(1, 12):
        for _ in range(200):
            found = generator.choices(tags, k=length)
            assert entities(found) == [(a, b + 1, kind) for kind, a, b in seqeval.get_entities(found)], found


def test_every_short_sequence_of_bio_round_trips() -> None:
    tags = ["O", "B-x", "I-x", "B-y", "I-y"]
    for found in itertools.product(tags, repeat=4):
        spans = entities(found)
        assert entities(bio(spans, 4)) == spans
        assert [tag == "O" for tag in bio(spans, 4)] == [tag == "O" for tag in found]


def test_entity_counts_and_score_of_a_case_by_hand() -> None:
    true = [(0, 2, "x"), (3, 4, "y"), (6, 7, "x")]
    counts = [
        entity_counts([[0, 2, "x"], [3, 4, "x"]], true),  # one right, one of the wrong type, two missed
        entity_counts([], [(0, 1, "x")]),
        entity_counts([[0, 1, "x"]], []),
        entity_counts([], []),
    ]
    assert counts == [(1, 1, 2), (0, 0, 1), (0, 1, 0), (0, 0, 0)]
    assert METRICS["entity F1"].score(counts) == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))


def test_rows_are_read_from_lists_texts_and_json() -> None:
    expected = {"tokens": ["a", "b"], "tags": ["B-x", "O"]}
    for tokens in (["a", "b"], "a b", '["a", "b"]'):
        for tags in (["I-x", "O"], "I-x O", '["I-x", "O"]'):
            assert TASK.read({"tokens": tokens, "tags": tags}) == expected
    assert PLAIN.read({"tokens": "a [b", "tags": "NOUN I-x"}) == {"tokens": ["a", "[b"], "tags": ["NOUN", "I-x"]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "as many tags as tokens, found 2 tags and 1 tokens"),
        ({"tokens": [], "tags": []}, "column 'tokens': expected a list of at least one text"),
        ({"tokens": ["a"]}, "column 'tags': expected a list of at least one text, found None"),
        ({"tokens": ["a"], "tags": [3]}, "found 3 in it; numbers of classes need their names"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "expected a list of texts, found ' '"),
        ({"tokens": "['a', 'b']", "tags": "O O"}, "expected a list as JSON writes it"),
        ({"tokens": ["a"], "tags": ["NOUN"]}, "found 'NOUN'; tags that are no entities need the task's `metric: token"),
        ({"tokens": ["a"], "tags": ["B-"]}, "expected O, or B- or I- and a type, such as B-person, found 'B-'"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.read(row)
    assert expected in str(caught.value)


def test_facts_are_closed_and_of_the_training_rows() -> None:
    train = [TASK.read({"tokens": ["a", "b"], "tags": ["I-y", "B-x"]})]
    test = [TASK.read({"tokens": ["a"], "tags": ["B-only-here"]})]
    assert TASK.facts({"train": train, "test": test}) == {"tags": ["O", "B-x", "I-x", "B-y", "I-y"]}
    with pytest.raises(RowError, match="expected entities in the training rows, found O alone"):
        TASK.facts({"train": [TASK.read({"tokens": ["a"], "tags": ["O"]})]})
    assert PLAIN.facts({"train": [{"tokens": ["a", "b"], "tags": ["NOUN", "ADJ"]}]}) == {"tags": ["ADJ", "NOUN"]}
    with pytest.raises(RowError, match="expected at least two tags"):
        PLAIN.facts({"train": [{"tokens": ["a"], "tags": ["NOUN"]}]})
    with pytest.raises(SuiteError, match="expected one of entity F1, token accuracy, found 'accuracy'"):
        TokenClassification(metric="accuracy")


@pytest.mark.parametrize("make", [word_pieces, bytes_pairs])
def test_labels_stand_on_the_first_token_of_each_word(make: Any) -> None:
    tokenizer = make()
    facts = {"tags": ["O", "B-city", "I-city", "B-person", "I-person"]}
    found = TASK.encode(tokenizer, ROW, facts)
    labelled = [(i, label) for i, label in enumerate(found["labels"]) if label != -100]
    assert [label for _, label in labelled] == [3, 4, 0, 1]
    assert [i for i, _ in labelled] == found["first"]
    # The token of each word begins with the word's first letter.
    pieces = tokenizer.convert_ids_to_tokens([found["input_ids"][i] for i in found["first"]])
    assert [piece.lstrip("Ġ")[0].lower() for piece in pieces] == ["a", "l", "l", "l"]
    assert len(found["labels"]) == len(found["input_ids"])
    if make is bytes_pairs:
        # As in running text: what the backbone was trained on.
        assert found["input_ids"] == tokenizer("Ada Lovelace left London")["input_ids"]
        assert all(piece.startswith("Ġ") for piece in pieces[1:])


def test_words_that_are_cut_off_or_vanish_have_no_token() -> None:
    facts = {"tags": ["O", "B-city", "I-city", "B-person", "I-person"]}
    short = TokenClassification(max_tokens=9)
    found = short.encode(word_pieces(), ROW, facts)
    assert len(found["input_ids"]) == 9
    assert found["first"] == [1, 4, -1, -1]
    vanished = TASK.encode(word_pieces(), {"tokens": ["a", "\u200b", "b"], "tags": ["O", "O", "B-city"]}, facts)
    assert vanished["first"] == [1, -1, 2]
    assert vanished["labels"] == [-100, 0, 1, -100]
    unknown = TASK.encode(word_pieces(), {"tokens": ["a"], "tags": ["B-planet"]}, facts)
    assert unknown["labels"] == [-100, -100, -100]
    with pytest.raises(SuiteError, match="expected a fast tokenizer"):
        TASK.encode(SimpleNamespace(is_fast=False), ROW, facts)


def oracle_for(found: Prepared) -> Oracle:
    """A model that is right about every first token whose id has one tag."""
    model = Oracle(len(found.facts["tags"]))
    with torch.no_grad():
        model.scores.weight.zero_()
        for row in found.splits["test"].encoded:
            for token, label in zip(row["input_ids"], row["labels"], strict=True):
                if label >= 0:
                    model.scores.weight[token, label] = 5.0
    return model


ROWS = [
    {"tokens": ["ab", "cd", "ef"], "tags": ["B-x", "I-x", "O"]},
    {"tokens": ["gh"], "tags": ["B-y"]},
    {"tokens": ["e", "a", "c", "g", "e", "e", "a"], "tags": ["O", "B-x", "I-x", "B-y", "O", "O", "B-x"]},
]


def test_predictions_are_entities_in_the_order_of_the_rows() -> None:
    found = prepared(TASK, ROWS, word_pieces())
    predictions = TASK.predict(oracle_for(found), found, "test")
    assert predictions == [[[0, 2, "x"]], [[0, 1, "y"]], [[1, 3, "x"], [3, 4, "y"], [6, 7, "x"]]]
    counts = TASK.counts(predictions, found, "test")
    assert counts == [(1, 0, 0), (1, 0, 0), (3, 0, 0)]
    assert TASK.nats(nn.Identity(), found, "test") is None
    # Entities beyond the cut are missed.
    short = TokenClassification(max_tokens=7)
    found = prepared(short, ROWS, word_pieces())
    predictions = short.predict(oracle_for(found), found, "test")
    assert predictions[2] == [[1, 3, "x"], [3, 4, "y"]]
    assert short.counts(predictions, found, "test")[2] == (2, 0, 1)


def test_token_accuracy_counts_words() -> None:
    found = prepared(PLAIN, ROWS, word_pieces())
    predictions = PLAIN.predict(oracle_for(found), found, "test")
    assert predictions == [row["tags"] for row in ROWS]
    predictions[0] = ["O", "I-x", ""]
    counts = PLAIN.counts(predictions, found, "test")
    assert counts == [(1, 3), (1, 1), (7, 7)]
    assert METRICS["token accuracy"].score(counts) == pytest.approx(9 / 11)


def test_loss_is_the_mean_over_labelled_tokens() -> None:
    found = prepared(TASK, ROWS, word_pieces())
    model = Oracle(len(found.facts["tags"]))
    encoded = found.splits["test"].encoded
    batch = TASK.collate(encoded, found.padding)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    expected = [
        -torch.log_softmax(model.scores.weight[token], -1)[label]
        for row in encoded
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label >= 0
    ]
    assert len(expected) == 11
    torch.testing.assert_close(TASK.loss(model, batch), torch.stack(expected).mean())
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert TASK.loss(model, nothing).item() == 0.0
