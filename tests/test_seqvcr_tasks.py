"""Seq-VCR's tasks: golden rows, the published format, exact values by other means, and a split that cannot leak."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from seqvcr import tasks
from seqvcr.tasks import CLOSE, FILL, MINUS, MODULUS, OPEN, OVER, PLUS, TIMES


def drawn(task: tasks.Task, count: int, seed: int = 0, training: bool = False) -> torch.Tensor:
    return task.draw(torch.Generator().manual_seed(seed), count, "cpu", training)


# ---------------------------------------------------------------------------------------------- multiplication


def test_the_line_of_the_specification():
    line = tasks.published_line(3719, 3349, 4)
    question, rest = line.split("||")
    thought, answer = rest.split(" #### ")
    assert question == "9 1 7 3 * 9 4 3 3" and answer == "1 3 9 4 5 4 2 1"
    assert thought == "1 7 4 3 3 + 0 6 7 8 4 1 ( 1 3 2 2 8 1 ) + 0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) + 0 0 0 7 5 1 1 1"


@pytest.mark.parametrize(("size", "count"), [(4, 46), (5, 74)])
def test_chains_of_thought_have_the_published_length_and_add_up(size, count):
    task = tasks.choose("multiplication", size)
    for a, b in zip(*(one.tolist() for one in tasks.factors_of(drawn(task, 50), size)), strict=True):
        thought = tasks.published_line(a, b, size).split("||")[1].split(" #### ")[0]
        assert len(thought.split()) == count
        total = 0
        for place, part in enumerate(thought.split(" + ")):
            term, _, running = part.partition(" ( ")
            value = int(term.replace(" ", "")[::-1])
            assert value == a * int(str(b)[::-1][place]) * 10**place
            total += value
            assert not running or int(running.removesuffix(" )").replace(" ", "")[::-1]) == total
        assert total == a * b


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_products_are_right_and_factors_have_their_digits(size):
    task = tasks.choose("multiplication", size)
    for row in drawn(task, 200).tolist():
        a, b, product = (
            int("".join(map(str, reversed(part))))
            for part in (row[:size], row[size + 1 : -2 * size - 1], row[-2 * size :])
        )
        assert a * b == product and len(str(a)) == len(str(b)) == size
        assert row[size] == 10 and row[2 * size + 1] == 11 and len(row) == task.question + task.answer
    assert tasks.readable(
        tasks.choose("multiplication", 4), tasks.product_rows(torch.tensor([3719]), torch.tensor([3349]), 4)[0]
    ) == ("3719 * 3349 = 12454931")


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_published_file_is_read_back(tmp_path):
    pairs = [(3719, 3349), (1000, 9999), (3719, 3349), (1234, 4321)]
    path = write(tmp_path / "train.txt", "\n".join(tasks.published_line(a, b, 4) for a, b in pairs) + "\n")
    found = tasks.factors_of(tasks.read_published(path, 4), 4)
    assert list(zip(*(one.tolist() for one in found), strict=True)) == [pairs[0], pairs[1], pairs[3]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 106656000\n", "Git-LFS pointer"),
        ("", "is empty"),
        ("1 2 * 3 4||x #### 5 0 0 0\n", "line 1 says 21 * 43 = 5"),
        (tasks.published_line(12, 34, 2) + "\n1 2 3 * 3 4 5||x #### 1 2 3 4 5 6\n", "line 2 is not"),
        ("12 * 34 = 408\n", "line 1 is not"),
    ],
)
def test_a_file_in_another_format_is_named(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tasks.read_published(write(tmp_path / "train.txt", text), 2)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and words in printed and "train.txt" in printed and printed.count("\n") == 1


def test_lines_of_a_file_that_fall_into_the_test_part_are_left_out(tmp_path):
    task = tasks.choose("multiplication", 2)
    path = write(
        tmp_path / "all.txt", "\n".join(tasks.published_line(a, b, 2) for a in range(10, 100) for b in range(10, 100))
    )
    data = tasks.load(task, 10**6, path, "cpu")
    own = tasks.load(task, 10**6, None, "cpu")
    assert torch.equal(data.test, own.test) and sorted(data.train.tolist()) == sorted(own.train.tolist())


def test_the_script_prints_lines_that_it_reads(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "seqvcr/tasks.py"), "--size", "5", "--lines", "4"],
                          capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert len(tasks.read_published(write(tmp_path / "a.txt", done.stdout), 5)) == 4


# ---------------------------------------------------------------------------------------------- arithmetic


def value_of(tokens: list[int]) -> int:
    """An expression's value modulo 11, by descent over sums, products and brackets; never by its derivation."""
    rest = list(tokens)

    def factor() -> int:
        token = rest.pop(0)
        if token == OPEN:
            inner = total()
            assert rest.pop(0) == CLOSE
            return inner
        assert token < MODULUS
        return token

    def product() -> int:
        left = factor()
        while rest and rest[0] in (TIMES, OVER):
            times, right = rest.pop(0) == TIMES, factor()
            assert times or right, "divided by zero"
            left = left * (right if times else pow(right, -1, MODULUS)) % MODULUS
        return left

    def total() -> int:
        left = product()
        while rest and rest[0] in (PLUS, MINUS):
            left = (left + product() if rest.pop(0) == PLUS else left - product()) % MODULUS
        return left

    found = total()
    assert not rest
    return found


def expression(row: torch.Tensor) -> list[int]:
    return [token for token in row.tolist() if token != FILL]


def test_every_step_of_a_derivation_keeps_the_value_and_divides_by_nothing():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((3000, 23), FILL)
    tokens[:, 0] = answers = torch.randint(0, MODULUS, (3000,), generator=generator)
    for step in range(6):
        tokens = tasks.grow(tokens, step + 1, generator)
        rows = [expression(row) for row in tokens]
        assert [value_of(row) for row in rows] == answers.tolist()
        assert all(sum(token < MODULUS for token in row) == step + 2 for row in rows)
        assert all(FILL not in row[: len(kept)] for row, kept in zip(tokens.tolist(), rows, strict=True))
    seen = {token for row in rows for token in row}
    assert seen == {*range(MODULUS), PLUS, MINUS, TIMES, OVER, OPEN, CLOSE}


@pytest.mark.parametrize(("operators", "lengths"), [(4, (9, 11, 15)), (5, (11, 13, 19)), (6, (13, 17, 23))])
def test_expressions_are_as_long_as_the_authors(operators, lengths):
    """Smallest, median and largest length that the specification counted in 20,000 draws."""
    task = tasks.choose("arithmetic", operators)
    rows = drawn(task, 20_000)
    found = sorted(len(expression(row)) for row in rows[:, : task.question - 1])
    assert (found[0], found[10_000], found[-1]) == lengths and task.question == lengths[-1] + 1
    assert (rows[:, task.question - 1] == FILL - 1).all()


def test_a_draw_of_expressions_ends_with_its_value_and_training_has_shorter_ones():
    task = tasks.choose("arithmetic", 5)
    for training in (False, True):
        rows = drawn(task, 6000, training=training)
        assert all(value_of(expression(row[: task.question - 1])) == row[-1] for row in rows[:500])
        operators = (rows[:, : task.question - 1] < MODULUS).sum(1) - 1
        shares = torch.bincount(operators, minlength=6)[1:] / 6000
        expected = torch.arange(1, 6) / 15 if training else torch.tensor([0, 0, 0, 0, 1.0])
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)


# ---------------------------------------------------------------------------------------------- lis


def brute_force(numbers: list[int]) -> int:
    longest = [1] * len(numbers)
    for i, j in itertools.product(range(len(numbers)), repeat=2):
        if j < i and numbers[j] < numbers[i]:
            longest[i] = max(longest[i], longest[j] + 1)
    return max(longest)


@pytest.mark.parametrize("size", [2, 12, 50])
def test_longest_increasing_subsequences_are_right(size):
    rows = drawn(tasks.choose("lis", size), 200)
    assert [brute_force(row[:size]) for row in rows.tolist()] == rows[:, -1].tolist()
    assert rows[:, :size].min() > size and (rows[:, size] == 250).all() and rows[:, :size].max() < 250
    assert tasks.longest_increasing(torch.tensor([[3, 3, 3], [1, 2, 3], [3, 2, 1], [2, 1, 3]])).tolist() == [1, 3, 1, 2]


def test_planted_runs_make_answers_longer_than_noise_has_them():
    rows, noise = drawn(tasks.choose("lis", 50), 500), torch.randint(51, 250, (500, 50))
    answers = rows[:, -1].float()
    assert answers.mean() > 1.5 * tasks.longest_increasing(noise).float().mean() and answers.std() > 5


# ---------------------------------------------------------------------------------------------- split


def test_the_hash_is_splitmix64():
    def plainly(x: int) -> int:
        mask = (1 << 64) - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    numbers = [0, 1, 5, 2**40 + 7, 2**63 - 1]
    assert [one % (1 << 64) for one in tasks.mixed(torch.tensor(numbers)).tolist()] == [plainly(one) for one in numbers]


@pytest.mark.parametrize(
    ("name", "size"), [("multiplication", 2), ("multiplication", 5), ("arithmetic", 3), ("lis", 6)]
)
def test_no_question_is_in_two_parts_nor_with_its_factors_swapped(name, size):
    task = tasks.choose(name, size)
    task.measured = 200
    data = tasks.load(task, 3000, None, "cpu")
    assert len(data.train) == 3000 and len(data.validation) == len(data.test) == 200
    parts = [{tuple(row) for row in part[:, : task.question].tolist()} for part in data]
    assert [len(part) for part in parts] == [3000, 200, 200]  # nothing twice
    if name == "multiplication":
        parts = [{tuple(sorted((row[:size], row[size + 1 : -1]))) for row in part} for part in parts]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    again = tasks.load(task, 3000, None, "cpu")
    assert all(torch.equal(*pair) for pair in zip(data, again, strict=True))


def test_another_derivation_of_an_expression_has_the_same_key():
    """( 2 + 3 ) grown into either side of a product is the same row whatever came first; the answer is left out."""
    task = tasks.choose("arithmetic", 2)
    end = [FILL, FILL, FILL - 1]
    rows = torch.tensor([[2, PLUS, 3, TIMES, 4, *end, 3], [2, PLUS, 3, TIMES, 4, *end, 9],
                         [3, PLUS, 2, TIMES, 4, *end, 3]], dtype=torch.uint8)  # fmt: skip
    keys = task.key(rows).tolist()
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("name", "size"), [("multiplication", 2), ("multiplication", 4), ("arithmetic", 5), ("lis", 10)]
)
def test_a_stream_never_shows_what_is_held_out(name, size):
    task = tasks.choose(name, size)
    rows = torch.cat([tasks.stream(task, 0, step, 256, "cpu") for step in range(8)])
    assert len(rows) == 2048 and (tasks.part_of(task, rows) == 0).all()
    assert not torch.equal(tasks.stream(task, 0, 1, 16, "cpu"), tasks.stream(task, 0, 2, 16, "cpu"))


def test_shares_of_the_parts_are_as_declared():
    task = tasks.choose("multiplication", 4)
    shares = torch.bincount(tasks.part_of(task, drawn(task, 100_000))) / 100_000
    torch.testing.assert_close(shares, torch.tensor([0.96, 0.02, 0.02]), rtol=0, atol=0.003)


def test_few_questions_end_the_search_for_more():
    data = tasks.load(tasks.choose("arithmetic", 1), 10**6, None, "cpu")
    assert 300 < len(data.train) < 500 and len(data.test) < 30


def test_pauses_stand_between_question_and_answer_and_are_one_token():
    task = tasks.choose("multiplication", 2)
    rows = tasks.with_pauses(task, drawn(task, 3), 4)
    assert [task.symbols[token] for token in rows[0, 5:12]] == ["=", tasks.PAUSES[0], *["<pause>"] * 4, tasks.PAUSES[2]]
    assert torch.equal(tasks.with_pauses(task, rows, 0), rows)
