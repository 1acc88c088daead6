"""Speculative decoding from outside: the answer stays the model's own, drafts are counted, and a draft model that does not fit is refused."""

import json

import pytest
from tiny_model import CONFIG, fails, random_weights, run, write_model

DRAFTS = ("-p", "hello", "-m", 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """A model of one layer."""
    config = CONFIG | {"num_hidden_layers": 1}
    return write_model(tmp_path_factory.mktemp("draft"), config, random_weights(config))


def generate_json(model, *args):
    result = run("generate", "--model", model, "--json", *args)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_greedy_stays_the_models_own(model, draft):
    plain = generate_json(model, *DRAFTS)
    assert plain["drafted_tokens"] == plain["accepted_tokens"] == 0
    for flags in (["--draft-model", model], ["--draft-model", draft, "--num-draft-tokens", 5], ["--ngram-draft-tokens", 8]):
        got = generate_json(model, *DRAFTS, *flags)
        assert got["tokens"] == plain["tokens"] and got["text"] == plain["text"], flags
        assert got["accepted_tokens"] <= got["drafted_tokens"]
    own = generate_json(model, *DRAFTS, "--draft-model", model)
    assert own["accepted_tokens"] == own["drafted_tokens"] > 10


def test_seed_repeats(model, draft):
    args = (*DRAFTS, "--temp", 1.0, "--top-p", 0.9, "--draft-model", draft, "--seed", 3)
    assert generate_json(model, *args)["tokens"] == generate_json(model, *args)["tokens"]


def test_statistics(model):
    out = run("generate", "--model", model, *DRAFTS, "--draft-model", model).stdout
    assert "\nDrafts: " in out and "(100.0 %)" in out
    assert "Drafts: " not in run("generate", "--model", model, *DRAFTS).stdout


def test_vocabularies_must_be_the_same(model, draft, tmp_path):
    other = write_model(tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("<|im_start|>", "<|start|>"))
    fails("generate", "--model", model, *DRAFTS, "--draft-model", other, says="<|start|>")
    changed = json.loads(text)
    changed["added_tokens"].append(changed["added_tokens"][0] | {"id": 258, "content": "<|more|>"})
    tokenizer.write_text(json.dumps(changed))
    fails("generate", "--model", model, *DRAFTS, "--draft-model", other, says="vocabulary of 259")


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--draft-model", "/no/such"], "/no/such"),
        (["--ngram-draft-tokens", "-1"], "ngram_draft_tokens"),
        (["--ngram-draft-tokens", "1000"], "ngram_draft_tokens"),
    ],
)
def test_bad_values(model, flags, says):
    fails("generate", "--model", model, "-p", "hello", *flags, says=says)


def test_bad_values_beside_a_draft_model(model):
    fails("generate", "--model", model, *DRAFTS, "--draft-model", model, "--num-draft-tokens", 0, says="num_draft_tokens")
    fails("generate", "--model", model, *DRAFTS, "--draft-model", model, "--ngram-draft-tokens", 4, says="ngram_draft_tokens")
