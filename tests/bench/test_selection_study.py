"""Test the selection study on a random model of a few thousand weights: its parts, rows and report."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tiny_llama import tiny_llama  # noqa: E402

from tokfuse.bench import selection_report, study_selection  # noqa: E402
from tokfuse.bench.study_pool import Pool, Sample, build_pool  # noqa: E402
from tokfuse.bench.study_selection import Settings, Split  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
S = Settings(
    per_kind=6,
    validation=4,
    held_out=5,
    blocks=1,
    steps=2,
    batch=4,
    warm_steps=1,
    warm_samples=6,
    members=2,
    rank=2,
    sketch_rank=4,
    lr=1e-2,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def split(model) -> Split:
    return Split(model, S.blocks)


@pytest.fixture(scope="module")
def pool() -> Pool:
    gen = torch.Generator().manual_seed(1)

    def samples(count: int, kind: int) -> list[Sample]:
        return [Sample(torch.randint(61, (6 + i % 3,), generator=gen), 4, 1.0, kind) for i in range(count)]

    train = [s for kind in range(3) for s in samples(S.per_kind, kind)]
    return Pool(train, samples(S.validation, 0), samples(S.held_out, 0))


def test_the_cut_model_is_the_model(model, split, pool) -> None:
    """Padding, the split and the packing change no result: log-probs and greedy answers."""
    answers = split.read(split.upper(), split.encode(pool.held_out))
    logp, hit = split.outcome(answers)
    for i, sample in enumerate(pool.held_out):
        with torch.no_grad():
            logits = model(sample.ids.unsqueeze(0)).logits[0, sample.prompt - 1 : -1]
        after = sample.ids[sample.prompt :]
        want = logits.log_softmax(-1).gather(1, after[:, None]).mean()
        torch.testing.assert_close(logp[i], want, rtol=1e-4, atol=1e-5)
        assert bool(hit[i]) == bool((logits.argmax(-1) == after).all())


def test_greedy_accuracy_is_that_of_generation(model, split) -> None:
    """Half of the samples contain the model's own greedy answers."""
    gen = torch.Generator().manual_seed(2)
    samples = []
    for i in range(6):
        prompt = torch.randint(3, 61, (1, 4), generator=gen)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=3,
            pad_token_id=0,
            eos_token_id=None,
        )[0]
        if i % 2:
            out = torch.cat([out[:-1], (out[-1:] + 1) % 61])
        samples.append(Sample(out, 4, 1.0, 0))
    _, hit = split.outcome(split.read(split.upper(), split.encode(samples)))
    assert hit.tolist() == [True, False] * 3


def test_features_are_of_single_samples(split, pool) -> None:
    """A sample's features and its sketch do not depend on the other samples, and buckets keep the order."""
    data, upper = split.encode(pool.train[:4]), split.upper().eval()
    together, alone = split.features(upper, data, S), split.features(upper, data.take([2]), S)
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-6)
    assert torch.linalg.vector_norm(together, dim=1).unique().numel() == 4
    assert all(p.grad is None for p in upper.parameters())
    sketches = [split.sketches(split.read(upper, some), 4) for some in (data, data.take([2]))]
    torch.testing.assert_close(sketches[0][2], sketches[1][0], rtol=1e-4, atol=1e-6)


def test_buckets_have_similar_lengths_and_every_sample_once() -> None:
    lengths = [9, 20, 8, 12, 40, 8, 13]
    assert study_selection.buckets(lengths) == [[2, 5, 0, 3], [6], [1], [4]]
    assert study_selection.buckets([3] * 5, most=2) == [[0, 1], [2, 3], [4]]


def test_training_moves_a_copy_only(model, split, pool) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = split.encode(pool.train)
    upper = split.train(split.upper(), data, S, 20, seed=0)
    better, _ = split.outcome(split.read(upper, data))
    first, _ = split.outcome(split.read(split.upper(), data))
    assert float(better.mean()) > float(first.mean())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = split.train(split.upper(), data, S, 20, seed=0)
    for a, b in zip(upper.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_resume_and_the_report_holds_them(split, pool, tmp_path) -> None:
    choices, never = tmp_path / "choices.json", math.inf
    rows = list(study_selection.run_seed(split, pool, S, 1, set(), choices, never))
    assert len(rows) == selection_report.RANKINGS == len({row.ranking for row in rows})
    by_name = {row.ranking: row for row in rows}
    assert by_name[study_selection.ORACLE].useful == 1.0
    assert {row.samples for row in rows} == {6}
    done = {row.ranking for row in rows} - {"LESS"}
    (again,) = study_selection.run_seed(split, pool, S, 1, done, choices, never)
    assert (again.ranking, again.after, again.logp) == ("LESS", by_name["LESS"].after, by_name["LESS"].logp)
    assert list(study_selection.run_seed(split, pool, S, 1, set(), choices, 0.0)) == []
    plain = [json.loads(json.dumps(vars(row))) for row in rows]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{selection_report.BEGIN}\nold\n{selection_report.END}\nafter\n")
    selection_report.write(page, plain)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert all(f"| {name} |" in text for name in by_name) and "| nothing |" in text
    lines = selection_report.table(plain).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 9
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        selection_report.write(page, plain)


def test_the_plot_is_written(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    row = {
        "ranking": "random",
        "seed": 1,
        "before": 0.5,
        "after": 0.6,
        "samples": 3,
        "useful": 0.5,
        "irrelevant": 0.25,
        "mislabelled": 0.25,
    }
    selection_report.plot(tmp_path / "out.png", [row, row | {"ranking": "LESS"}])
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_the_pool_of_sums() -> None:
    """Correct and wrong answers, other tasks, and no held-out question among the training samples."""
    pytest.importorskip("reasoning_gym")

    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    pool = build_pool(Letters(), 1, per_kind=10, validation=5, held_out=20)
    texts = ["".join(map(chr, s.ids.tolist())) for s in pool.train + pool.validation]
    held = {"".join(map(chr, s.ids.tolist())).split("\n")[1].split(" =")[0] for s in pool.held_out}
    assert [s.group for s in pool.train] == [0] * 10 + [1] * 10 + [2] * 10
    for text, sample in zip(texts, [*pool.train, *pool.validation], strict=True):
        if sample.group != 1:
            question, answer = text.split("\n")[1].split(" = ")
            assert question not in held
            assert (eval(question) == int(answer)) == (sample.group == 0)
            assert text.endswith("\n") and chr(int(sample.ids[sample.prompt])) == " "


def test_the_page_is_what_the_rows_say() -> None:
    page, rows = ROOT / "docs" / "selection_study.md", ROOT / "docs" / "selection_study.jsonl"
    found = study_selection.rows_of(rows)
    written = page.read_text().split(selection_report.BEGIN)[1].split(selection_report.END)[0]
    assert written.strip() == f"{selection_report.table(found)}\n\n{selection_report.facts(found)}"
    runs = [(row["seed"], row["ranking"]) for row in found]
    seeds = {seed for seed, _ in runs}
    assert len(runs) == len(set(runs)) and seeds == set(range(1, len(seeds) + 1))
    assert len(runs) == len(seeds) * selection_report.RANKINGS
    for seed in seeds:  # scores are compared within a seed, so its rows come from one version of the code
        assert len({row["commit"] for row in found if row["seed"] == seed}) == 1


def test_means_have_standard_errors() -> None:
    assert selection_report.with_error([0.2, 0.4, 0.6]) == "0.400 +- 0.115"
    assert selection_report.with_error([0.5], sign="+") == "+0.500"
    random = {"ranking": "random", "before": 0.5, "useful": 0.3, "irrelevant": 0.3, "mislabelled": 0.4, "logp": -1.0}
    rows = [random | {"seed": seed, "after": after} for seed, after in ((1, 0.3), (2, 0.1))]
    rows += [row | {"ranking": "LESS", "after": row["after"] + 0.2} for row in rows]
    line = next(x for x in selection_report.table(rows).splitlines() if x.startswith("| LESS"))
    assert line == "| LESS | 30% | 30% | 40% | 0.400 +- 0.100 | +0.200 +- 0.000 | -1.000 +- 0.000 |"  # paired by seed
