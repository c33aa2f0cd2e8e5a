"""Tasks of Seq-VCR: example rows, Deng et al.'s file format, values from independent code, splits without leakage."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from seqvcr import tasks
from seqvcr.tasks import CLOSE, EQUALS, MINUS, MODULUS, OPEN, OVER, PAD, PLUS, TIMES


def draw_rows(task: tasks.Task, count: int, seed: int = 0, training: bool = False) -> torch.Tensor:
    return task.draw(torch.Generator().manual_seed(seed), count, "cpu", training)


# ---------------------------------------------------------------------------------------------- multiplication


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_chains_of_thought_are_those_of_the_published_lines(size):
    task = tasks.build_task("multiplication", size)
    a, b = torch.randint(10 ** (size - 1), 10**size, (2, 30), generator=torch.Generator().manual_seed(0))
    rows = tasks.multiplication_rows(a, b, size)
    with_chain = tasks.with_chain(task, rows)
    assert with_chain.shape == (30, rows.shape[1] + tasks.chain_length(size)) and with_chain.dtype == rows.dtype
    symbols = (*task.symbols, *tasks.CHAIN)
    for row, first, second in zip(with_chain.tolist(), a.tolist(), b.tolist(), strict=True):
        line = tasks.published_line(first, second, size).replace("||", " = ")
        assert " ".join(symbols[token] for token in row) == line


def test_published_line_of_one_example():
    line = tasks.published_line(3719, 3349, 4)
    question, rest = line.split("||")
    chain, answer = rest.split(" #### ")
    assert question == "9 1 7 3 * 9 4 3 3" and answer == "1 3 9 4 5 4 2 1"
    assert chain == "1 7 4 3 3 + 0 6 7 8 4 1 ( 1 3 2 2 8 1 ) + 0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) + 0 0 0 7 5 1 1 1"


@pytest.mark.parametrize(("size", "count"), [(4, 46), (5, 74)])
def test_chains_of_thought_have_the_published_length_and_sum_to_the_product(size, count):
    task = tasks.build_task("multiplication", size)
    factors_a, factors_b = tasks.factors_of(draw_rows(task, 50), size)
    for a, b in zip(factors_a.tolist(), factors_b.tolist(), strict=True):
        chain = tasks.published_line(a, b, size).split("||")[1].split(" #### ")[0]
        assert len(chain.split()) == count
        total = 0
        for position, part in enumerate(chain.split(" + ")):
            term, _, running_sum = part.partition(" ( ")
            value = int(term.replace(" ", "")[::-1])
            assert value == a * int(str(b)[::-1][position]) * 10**position
            total += value
            assert not running_sum or int(running_sum.removesuffix(" )").replace(" ", "")[::-1]) == total
        assert total == a * b


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_products_are_correct_and_factors_have_size_digits(size):
    task = tasks.build_task("multiplication", size)
    for row in draw_rows(task, 200).tolist():
        a, b, product = (
            int("".join(map(str, reversed(part))))
            for part in (row[:size], row[size + 1 : -2 * size - 1], row[-2 * size :])
        )
        assert a * b == product and len(str(a)) == len(str(b)) == size
        assert row[size] == 10 and row[2 * size + 1] == 11 and len(row) == task.question + task.answer
    row = tasks.multiplication_rows(torch.tensor([3719]), torch.tensor([3349]), 4)[0]
    assert tasks.to_text(tasks.build_task("multiplication", 4), row) == "3719 * 3349 = 12454931"


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_read_published_returns_the_distinct_pairs_of_a_file(tmp_path):
    pairs = [(3719, 3349), (1000, 9999), (3719, 3349), (1234, 4321)]
    path = write(tmp_path / "train.txt", "\n".join(tasks.published_line(a, b, 4) for a, b in pairs) + "\n")
    a, b = tasks.factors_of(tasks.read_published(path, 4), 4)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [pairs[0], pairs[1], pairs[3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 106656000\n", "Git LFS pointer"),
        ("", "is empty: give a file with one problem per line"),
        ("1 2 * 3 4||x #### 5 0 0 0\n", "line 1: wrong product 21 * 43 = 5: write digits"),
        (tasks.published_line(12, 34, 2) + "\n1 2 3 * 3 4 5||x #### 1 2 3 4 5 6\n", "line 2: expected"),
        ("12 * 34 = 408\n", "train with their --size, or correct the line"),
    ],
)
def test_a_malformed_data_file_exits_with_its_name_and_line(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tasks.read_published(write(tmp_path / "train.txt", text), 2)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and "train.txt" in printed and printed.count("\n") == 1


def test_a_data_file_may_end_with_an_empty_line_and_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + tasks.published_line(12, 34, 2).encode() + b"\r\n\r\n")
    assert len(tasks.read_published(path, 2)) == 1
    path.write_bytes("1 2 * 3 4||é".encode("latin-1"))
    with pytest.raises(SystemExit) as end:
        tasks.read_published(path, 2)
    assert end.value.code == 2


def test_rows_of_a_data_file_in_the_validation_or_test_split_are_removed(tmp_path):
    task = tasks.build_task("multiplication", 2)
    lines = [tasks.published_line(a, b, 2) for a in range(10, 100) for b in range(10, 100)]
    path = write(tmp_path / "all.txt", "\n".join(lines))
    data = tasks.load(task, 10**6, path, "cpu")
    generated = tasks.load(task, 10**6, None, "cpu")
    assert torch.equal(data.test, generated.test) and sorted(data.train.tolist()) == sorted(generated.train.tolist())


def test_read_published_accepts_the_output_of_the_script(tmp_path):
    command = [sys.executable, str(ROOT / "seqvcr/tasks.py"), "--size", "5", "--lines", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={})
    assert len(tasks.read_published(write(tmp_path / "a.txt", done.stdout), 5)) == 4


# ---------------------------------------------------------------------------------------------- arithmetic


def value_of(tokens: list[int]) -> int:
    """Return the value of an expression modulo 11. A recursive-descent parser, independent of how it was derived."""
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

    value = total()
    assert not rest
    return value


def expression(row: torch.Tensor) -> list[int]:
    return [token for token in row.tolist() if token != PAD]


def test_expand_number_keeps_the_value_and_never_divides_by_zero():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((3000, 23), PAD)
    tokens[:, 0] = answers = torch.randint(0, MODULUS, (3000,), generator=generator)
    for step in range(6):
        tokens = tasks.expand_number(tokens, step + 1, generator)
        rows = [expression(row) for row in tokens]
        assert [value_of(row) for row in rows] == answers.tolist()
        assert all(sum(token < MODULUS for token in row) == step + 2 for row in rows)
        assert all(PAD not in row[: len(kept)] for row, kept in zip(tokens.tolist(), rows, strict=True))
    used = {token for row in rows for token in row}
    assert used == {*range(MODULUS), PLUS, MINUS, TIMES, OVER, OPEN, CLOSE}


@pytest.mark.parametrize(("operators", "lengths"), [(4, (9, 11, 15)), (5, (11, 13, 19)), (6, (13, 17, 23))])
def test_expressions_have_the_lengths_of_the_published_generator(operators, lengths):
    """`lengths`: minimum, median and maximum of 20,000 expressions of the published generator."""
    task = tasks.build_task("arithmetic", operators)
    rows = draw_rows(task, 20_000)
    counted = sorted(len(expression(row)) for row in rows[:, : task.question - 1])
    assert (counted[0], counted[10_000], counted[-1]) == lengths and task.question == lengths[-1] + 1
    assert (rows[:, task.question - 1] == EQUALS).all()


def test_answers_are_the_values_of_the_expressions_and_training_has_fewer_operators():
    task = tasks.build_task("arithmetic", 5)
    for training in (False, True):
        rows = draw_rows(task, 6000, training=training)
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
def test_longest_increasing_equals_brute_force(size):
    rows = draw_rows(tasks.build_task("lis", size), 200)
    assert [brute_force(row[:size]) for row in rows.tolist()] == rows[:, -1].tolist()
    assert rows[:, :size].min() > size and (rows[:, size] == 250).all() and rows[:, :size].max() < 250
    assert tasks.longest_increasing(torch.tensor([[3, 3, 3], [1, 2, 3], [3, 2, 1], [2, 1, 3]])).tolist() == [1, 3, 1, 2]


def test_planted_sequences_give_longer_answers_than_random_numbers():
    rows, noise = draw_rows(tasks.build_task("lis", 50), 500), torch.randint(51, 250, (500, 50))
    answers = rows[:, -1].float()
    assert answers.mean() > 1.5 * tasks.longest_increasing(noise).float().mean() and answers.std() > 5


# ---------------------------------------------------------------------------------------------- split


def test_the_hash_is_splitmix64():
    def reference(x: int) -> int:
        mask = (1 << 64) - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    numbers = [0, 1, 5, 2**40 + 7, 2**63 - 1]
    hashed = [value % (1 << 64) for value in tasks.splitmix64(torch.tensor(numbers)).tolist()]
    assert hashed == [reference(number) for number in numbers]


@pytest.mark.parametrize(
    ("name", "size"), [("multiplication", 2), ("multiplication", 5), ("arithmetic", 3), ("lis", 6)]
)
def test_no_question_is_in_two_splits_even_with_swapped_factors(name, size):
    task = tasks.build_task(name, size)
    task.eval_rows = 200
    data = tasks.load(task, 3000, None, "cpu")
    assert len(data.train) == 3000 and len(data.validation) == len(data.test) == 200
    splits = [{tuple(row) for row in rows[:, : task.question].tolist()} for rows in data]
    assert [len(split) for split in splits] == [3000, 200, 200]  # no duplicates
    if name == "multiplication":
        splits = [{tuple(sorted((row[:size], row[size + 1 : -1]))) for row in split} for split in splits]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    again = tasks.load(task, 3000, None, "cpu")
    assert all(torch.equal(*pair) for pair in zip(data, again, strict=True))


def test_the_key_of_an_expression_depends_on_its_tokens_but_not_on_the_answer():
    task = tasks.build_task("arithmetic", 2)
    end = [PAD, PAD, EQUALS]
    rows = torch.tensor([[2, PLUS, 3, TIMES, 4, *end, 3], [2, PLUS, 3, TIMES, 4, *end, 9],
                         [3, PLUS, 2, TIMES, 4, *end, 3]], dtype=torch.uint8)  # fmt: skip
    keys = task.key(rows).tolist()
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("name", "size"), [("multiplication", 2), ("multiplication", 4), ("arithmetic", 5), ("lis", 10)]
)
def test_a_stream_yields_only_training_rows_and_new_rows_at_each_step(name, size):
    task = tasks.build_task(name, size)
    rows = torch.cat([tasks.stream(task, 0, step, 256, "cpu") for step in range(8)])
    assert len(rows) == 2048 and (tasks.split_of(task, rows) == tasks.TRAIN).all()
    assert not torch.equal(tasks.stream(task, 0, 1, 16, "cpu"), tasks.stream(task, 0, 2, 16, "cpu"))


def test_validation_and_test_have_two_percent_of_the_keys_each():
    task = tasks.build_task("multiplication", 4)
    shares = torch.bincount(tasks.split_of(task, draw_rows(task, 100_000))) / 100_000
    torch.testing.assert_close(shares, torch.tensor([0.96, 0.02, 0.02]), rtol=0, atol=0.003)


def test_draw_distinct_stops_when_a_task_has_too_few_questions():
    data = tasks.load(tasks.build_task("arithmetic", 1), 10**6, None, "cpu")
    assert 300 < len(data.train) < 500 and len(data.test) < 30


def test_the_pause_block_is_between_question_and_answer():
    task = tasks.build_task("multiplication", 2)
    rows = tasks.with_pauses(task, draw_rows(task, 3), 4)
    assert [task.symbols[token] for token in rows[0, 5:12]] == ["=", tasks.PAUSES[0], *["<pause>"] * 4, tasks.PAUSES[2]]
    assert torch.equal(tasks.with_pauses(task, rows, 0), rows)
