"""The three tasks of Seq-VCR: tokens, random examples from a seed, and a split without leakage.

    python seqvcr/tasks.py --size 4 --lines 3      # multiplication in Deng et al.'s format, with chain of thought

An example is a row of tokens: question, then answer. The first tokens are the numbers 0, 1, ...; the other symbols of
the task follow. Every question ends with "=". Nothing is downloaded: rows are drawn from the data seed or, as a stream,
from the seed of the run. Random numbers are drawn on the CPU, and the integer arithmetic that follows runs on the
device, so rows are equal on all devices.

multiplication  two factors of n digits and their product, zero-padded to 2n digits; least significant digit first
                (the files of Deng et al. 2023): 9 1 7 3 * 9 4 3 3 = 1 3 9 4 5 4 2 1 is 3719 * 3349 = 12454931
arithmetic      an expression of numbers modulo 11 with n operators, and its value (Feng et al. 2023); padded between
                expression and "=", so that "=" and answer are at the same position in every row
lis             n numbers, and the length of their longest increasing subsequence (Feng et al. 2023)

The split is a hash of the data seed and a key: the unordered pair of factors, the expression (not its derivation), or
the numbers. Rows with equal keys are in the same split.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, files, seeding
from common.cli import fail
from common.devices import upload

PAUSES = ("</pause_start>", "<pause>", "</pause_end>")  # the last three tokens of every task
CHAIN = ("+", "(", ")", "####")  # further tokens of a chain of thought; they follow those of the task
DIGITS = tuple(map(str, range(10)))
MODULUS = 11
PLUS, MINUS, TIMES, OVER, OPEN, CLOSE, EQUALS, PAD = range(MODULUS, MODULUS + 8)  # tokens of arithmetic
ATTEMPTS = 16  # operators drawn per expansion, because some have no solution
FILE_FORMAT = "a file with one problem per line: `a * b||... #### product`"
LIS_LIMIT = 250  # numbers of lis are smaller; also the token of "="
ROWS_PER_DRAW = 1 << 16
TRAIN, VALIDATION, TEST = range(3)


class Task:
    """A task of one size: tokens, random rows, and the keys that define the split.

    A row has `question` tokens, then `answer` tokens, uint8. `symbols` are the tokens as text.
    Validation and test each get `held_out_permille` / 1000 of the keys and at most `eval_rows` rows.
    """

    name: str
    sizes: tuple[int, int]  # smallest and largest
    symbols: tuple[str, ...]
    held_out_permille = 20
    eval_rows = 10_000
    data_seed = 0

    def __init__(self, size: int, question: int, answer: int):
        self.size, self.question, self.answer = size, question, answer

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        """Return random rows (count, question + answer). `training`: with the distribution of the training split."""
        raise NotImplementedError

    def key(self, rows: Tensor) -> Tensor:
        """Return the split key of each row, (count,) int64. Rows with equal keys are in the same split."""
        return hash_question(rows)

    def all_rows(self) -> Tensor | None:
        """Return all possible rows, or None if there are too many."""
        return None


def randint(
    low: int, high: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Return random integers in [low, high), int64, drawn on the CPU and copied to `device`."""
    return upload(torch.randint(low, high, shape, generator=generator), device)


# ------------------------------------------------------------------------------------------------- multiplication


class Multiplication(Task):
    """Two factors of `size` digits, uniform among the numbers without a leading zero, and their product."""

    name = "multiplication"
    sizes = (1, 9)
    symbols = (*DIGITS, "*", "=", *PAUSES)
    eval_rows = 1000

    def __init__(self, size: int):
        super().__init__(size, question=2 * size + 2, answer=2 * size)
        self.held_out_permille = 20 if size > 3 else 100

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        factors = randint(10 ** (self.size - 1), 10**self.size, (2, count), generator, device)
        return multiplication_rows(factors[0], factors[1], self.size)

    def key(self, rows: Tensor) -> Tensor:
        """Return a number for the unordered pair of factors, equal for a * b and b * a."""
        a, b = factors_of(rows, self.size)
        return torch.minimum(a, b) * 10**self.size + torch.maximum(a, b)

    def all_rows(self) -> Tensor | None:
        """Return all 81, 8,100 or 810,000 rows for factors of one, two or three digits."""
        if self.size > 3:
            return None
        factors = torch.arange(10 ** (self.size - 1), 10**self.size)
        a, b = torch.cartesian_prod(factors, factors).T
        return multiplication_rows(a, b, self.size)


def digits_of(numbers: Tensor, count: int) -> Tensor:
    """Return the `count` last digits of integers (n,), least significant first: (n, count) int64."""
    return numbers[:, None] // 10 ** torch.arange(count, device=numbers.device) % 10


def multiplication_rows(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Return the rows of the factors a and b, (n,) int64 each of `size` digits."""
    times, equals = torch.full_like(a, 10)[:, None], torch.full_like(a, 11)[:, None]
    columns = [digits_of(a, size), times, digits_of(b, size), equals, digits_of(a * b, 2 * size)]
    return torch.cat(columns, 1).to(torch.uint8)


def factors_of(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of rows, (n,) int64 each."""
    powers = 10 ** torch.arange(size, device=rows.device)
    return (rows[:, :size] * powers).sum(1), (rows[:, size + 1 : 2 * size + 1] * powers).sum(1)


def published_line(a: int, b: int, size: int) -> str:
    """Return a * b as a line in the format of Deng et al.: question, chain of thought, product.

    The chain of thought has one partial product per digit of b, with running sums in brackets.
    """

    def reversed_digits(number: int, width: int) -> str:
        return " ".join(reversed(f"{number:0{width}d}"))

    terms, total = [], 0
    for position, digit in enumerate(reversed(f"{b:0{size}d}")):
        term = a * int(digit)
        total += term * 10**position
        text = " ".join(["0"] * position + [reversed_digits(term, size + 1)])
        if 1 <= position <= size - 2:
            text += f" ( {reversed_digits(total, size + 1 + position)} )"
        terms.append(text)
    question = f"{reversed_digits(a, size)} * {reversed_digits(b, size)}"
    return f"{question}||{' + '.join(terms)} #### {reversed_digits(a * b, 2 * size)}"


def read_published(path: Path, size: int) -> Tensor:
    """Return the distinct rows of a file in the format of Deng et al. (`published_line`), uint8.

    Exits with code 2 if the file cannot be read, is empty or has a malformed line. The message names the first one.
    """
    try:
        lines = files.read_text_lines(path)
    except FileNotFoundError:
        fail(f"--data-file {path} does not exist: give {FILE_FORMAT}")
    except OSError as error:
        fail(f"--data-file {path} cannot be read ({error.strerror}): give {FILE_FORMAT}")
    except files.DamagedFile as error:
        fail(f"--data-file {error}")
    if lines and lines[0].startswith("version https://git-lfs"):
        fail(f"--data-file {path} is a Git LFS pointer: run `git lfs pull` to get the file itself")
    factor, product = (rf"(\d(?: \d){{{count - 1}}})" for count in (size, 2 * size))
    pattern = re.compile(rf"{factor} \* {factor}\|\|.*#### {product}")
    pairs = []
    for number, line in enumerate(lines, 1):
        match = pattern.fullmatch(line.rstrip())
        if match is None:
            fail(f"--data-file {path}, line {number}: expected `a * b||... #### product` with factors of {size} digits"
                 f", got {line[:60]!r}: train with their --size, or correct the line")  # fmt: skip
        a, b, answer = (int(text.replace(" ", "")[::-1]) for text in match.groups())
        if a * b != answer:
            fail(f"--data-file {path}, line {number}: wrong product {a} * {b} = {answer}: write digits least "
                 "significant first")  # fmt: skip
        pairs.append((a, b))
    if not pairs:
        fail(f"--data-file {path} is empty: give {FILE_FORMAT}")
    factors = torch.tensor(list(dict.fromkeys(pairs)))
    return multiplication_rows(factors[:, 0], factors[:, 1], size)


# ------------------------------------------------------------------------------------------------- arithmetic


class Arithmetic(Task):
    """Expressions modulo 11 with `size` operators; in training with i = 1..size operators, in proportion to i."""

    name = "arithmetic"
    sizes = (1, 50)
    symbols = (*DIGITS, "10", "+", "-", "*", "/", "(", ")", "=", "_", *PAUSES)

    def __init__(self, size: int):
        super().__init__(size, question=4 * size, answer=1)

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        tokens = torch.full((count, 4 * self.size - 1), PAD, device=device)
        tokens[:, 0] = answer = randint(0, MODULUS, (count,), generator, device)
        operators = torch.full((count,), self.size, device=device)
        if training:
            cumulative = torch.arange(1, self.size + 1, device=device).cumsum(0)
            index = randint(0, self.size * (self.size + 1) // 2, (count,), generator, device)
            operators = torch.searchsorted(cumulative, index, right=True) + 1
        for step in range(self.size):
            tokens = torch.where((step < operators)[:, None], expand_number(tokens, step + 1, generator), tokens)
        return torch.cat([tokens, torch.full_like(tokens[:, :1], EQUALS), answer[:, None]], 1).to(torch.uint8)


def expand_number(tokens: Tensor, numbers: int, generator: torch.Generator) -> Tensor:
    """Return the expressions with one random number replaced by `a operator b` of the same value modulo 11.

    `tokens` (n, width) are expressions with `numbers` numbers each, padded on the right; the result has the same shape.
    Brackets are added where precedence needs them. No divisor is zero.
    """
    count, width = tokens.shape
    device = tokens.device
    chosen = randint(1, numbers + 1, (count, 1), generator, device)
    is_number = tokens < MODULUS
    position = (is_number & (is_number.cumsum(1) == chosen)).int().argmax(1, keepdim=True)
    value = tokens.gather(1, position)

    operator = randint(PLUS, OVER + 1, (count, ATTEMPTS), generator, device)
    operator[:, -1] = PLUS  # always has a solution; all 15 others fail with probability below 1e-8
    a = randint(0, MODULUS, (count, ATTEMPTS), generator, device)
    solvable = (operator < TIMES) | ((a != 0) & ((operator == TIMES) | (value != 0)))
    first = solvable.int().argmax(1, keepdim=True)
    operator, a = operator.gather(1, first), a.gather(1, first)
    b = torch.where(operator == PLUS, value - a, a - value)
    b = torch.where(operator == TIMES, value * a ** (MODULUS - 2), b)  # Fermat: this power is the inverse
    b = torch.where(operator == OVER, a * value ** (MODULUS - 2), b) % MODULUS

    left = torch.where(position > 0, tokens.gather(1, (position - 1).clamp(min=0)), PAD)
    right = torch.where(position + 1 < width, tokens.gather(1, (position + 1).clamp(max=width - 1)), PAD)
    binds_tighter = (left == TIMES) | (left == MINUS) | (right == TIMES) | (right == OVER)
    needs_brackets = (left == OVER) | ((operator < TIMES) & binds_tighter)
    without = torch.cat([a, operator, b, b, b], 1)  # the last two columns are not used
    bracketed = torch.cat([torch.full_like(a, OPEN), a, operator, b, torch.full_like(a, CLOSE)], 1)
    expansion, length = torch.where(needs_brackets, bracketed, without), torch.where(needs_brackets, 5, 3)
    column = torch.arange(width, device=device).expand_as(tokens)
    shifted = tokens.gather(1, torch.where(column < position, column, (column - length + 1).clamp(min=0)))
    inside = (column >= position) & (column < position + length)
    return torch.where(inside, expansion.gather(1, (column - position).clamp(0, 4)), shifted)


# ------------------------------------------------------------------------------------------------- lis


class LIS(Task):
    """`size` numbers, and the length of their longest increasing subsequence.

    The numbers are larger than `size`, because the tokens up to `size` are answers. They are random, with one to three
    increasing sequences planted at random positions.
    """

    name = "lis"
    sizes = (2, 200)
    symbols = (*map(str, range(LIS_LIMIT)), "=", *PAUSES)

    def __init__(self, size: int):
        super().__init__(size, question=size + 1, answer=1)

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        shape = (count, self.size)
        numbers = randint(self.size + 1, LIS_LIMIT, shape, generator, device)
        sequences = randint(1, 4, (count, 1), generator, device)
        for sequence in range(3):
            share = torch.rand((count, 1), generator=generator)
            planted = upload(torch.rand(shape, generator=generator) < share, device) & (sequence < sequences)
            new = randint(self.size + 1, LIS_LIMIT, shape, generator, device)
            increasing = torch.where(planted, new, LIS_LIMIT).sort(1).values
            numbers = torch.where(planted, increasing.gather(1, (planted.cumsum(1) - 1).clamp(min=0)), numbers)
        equals = torch.full_like(numbers[:, :1], LIS_LIMIT)
        return torch.cat([numbers, equals, longest_increasing(numbers)[:, None]], 1).to(torch.uint8)


def longest_increasing(numbers: Tensor) -> Tensor:
    """Return the length of the longest strictly increasing subsequence of each row (n, size): (n,).

    Patience sorting: tails[:, k] is the smallest last number of an increasing subsequence of length k + 1.
    """
    tails = torch.full_like(numbers, torch.iinfo(numbers.dtype).max)
    for column in range(numbers.shape[1]):
        number = numbers[:, column : column + 1].contiguous()
        tails.scatter_(1, torch.searchsorted(tails, number), number)
    return (tails < torch.iinfo(numbers.dtype).max).sum(1)


def build_task(name: str, size: int, data_seed: int = 0) -> Task:
    """Return the task `name` with factors of `size` digits, `size` operators, or `size` numbers.

    `data_seed` determines the split, and which rows are drawn. Exits with code 2 if the size is out of range.
    """
    task_class = {"multiplication": Multiplication, "arithmetic": Arithmetic, "lis": LIS}[name]
    low, high = task_class.sizes
    if not low <= size <= high:
        fail(f"invalid --size {size} for the task {name}: give {low} to {high}")
    task = task_class(size)
    task.data_seed = data_seed
    return task


# ------------------------------------------------------------------------------------------------- split


def splitmix64(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 to int64, whose products wrap like unsigned ones."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_question(rows: Tensor) -> Tensor:
    """Return a hash of the tokens of a question and their positions, (n,) int64. The answer must be one token."""
    tokens = rows[:, :-1].long()
    return splitmix64(splitmix64(tokens + 256 * torch.arange(1, tokens.shape[1] + 1, device=rows.device)).sum(1))


def split_of(task: Task, rows: Tensor) -> Tensor:
    """Return TRAIN, VALIDATION or TEST for each row, (n,) int64."""
    # The seed is hashed before it is added to the keys: otherwise seed 1 would only shift the split of seed 0.
    hashed = splitmix64(task.key(rows) + splitmix64(torch.tensor(task.data_seed)))
    bucket = ((hashed >> 1) & ((1 << 62) - 1)) % 1000
    permille = task.held_out_permille
    return (bucket < 2 * permille).long() + (bucket < permille).long()


class Splits(NamedTuple):
    """Rows of the three splits, (n, question + answer) uint8. No key is in two of them."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(task: Task, train_size: int, data_file: Path | None, device: torch.device | str) -> Splits:
    """Return at most `train_size` distinct training rows, and at most `task.eval_rows` rows for validation and test.

    Training rows come from `data_file` if given (format of Deng et al.). All other rows are drawn from the task's data
    seed.
    """
    possible = task.all_rows()
    if possible is not None:
        rows = possible.to(device)
        splits = [rows[split_of(task, rows) == split] for split in (TRAIN, VALIDATION, TEST)]
        train, validation, test = (
            rows[seeding.permutation(task.data_seed, "examples", split, len(rows), device)]
            for split, rows in enumerate(splits)
        )
    else:
        train = draw_distinct(task, TRAIN, 0 if data_file else train_size, device)
        validation = draw_distinct(task, VALIDATION, task.eval_rows, device)
        test = draw_distinct(task, TEST, task.eval_rows, device)
    if data_file:
        rows = read_published(data_file, task.size).to(device)
        train = rows[split_of(task, rows) == TRAIN]
        removed = len(rows) - len(train)
        print(f"{data_file}: {len(rows)} distinct rows, {removed} removed because they belong to the validation or "
              "test split", flush=True)  # fmt: skip
    if len(train) < train_size:
        print(f"--train-size {train_size}: only {len(train)} distinct training rows are available", flush=True)
    return Splits(train[:train_size], validation[: task.eval_rows], test[: task.eval_rows])


def draw_distinct(task: Task, split: int, count: int, device: torch.device | str) -> Tensor:
    """Return `count` distinct random rows of a split, or fewer if further draws give almost no new rows.

    In training, the first `count` arithmetic expressions have mixed numbers of operators. Those that replace duplicates
    have `task.size` operators.
    """
    rows = torch.zeros((0, task.question + task.answer), dtype=torch.uint8, device=device)
    drawn = 0
    while len(rows) < count:
        before = len(rows)
        generator = seeding.generator(task.data_seed, f"{task.name} of part {split}", drawn)
        new = task.draw(generator, ROWS_PER_DRAW, device, split == TRAIN and drawn < count)
        rows = torch.cat([rows, new[split_of(task, new) == split]])
        drawn += ROWS_PER_DRAW
        # Deduplicate by key: keep the first row of each key, in order.
        keys, inverse = task.key(rows).unique(return_inverse=True)
        index = torch.arange(len(rows), device=device)
        first = torch.full_like(keys, len(rows)).scatter_reduce_(0, inverse, index, "amin")
        rows = rows[first.sort().values]
        if len(rows) - before < ROWS_PER_DRAW // 5000:
            break
    return rows[:count]


def stream(task: Task, seed: int, step: int, count: int, device: torch.device | str) -> Tensor:
    """Return `count` new training rows. They depend on (seed, step) and the split.

    There is no host-device synchronisation.
    """
    generator = seeding.generator(seed, f"stream of {task.name}", step)
    rows = task.draw(generator, 2 * count + 64, device, True)  # on average at least 4 of 5 are training rows
    is_train = (split_of(task, rows) == TRAIN).int()
    return rows[is_train.argsort(descending=True, stable=True)[:count]]


# ------------------------------------------------------------------------------------------------- layout


def with_pauses(task: Task, rows: Tensor, pause: int) -> Tensor:
    """Return rows with the pause block after the question: start marker, `pause` pause tokens, end marker.

    With `pause` = 0 the rows are returned unchanged.
    """
    if not pause:
        return rows
    start = len(task.symbols) - len(PAUSES)
    block = [rows.new_full((len(rows), count), start + number) for number, count in enumerate((1, pause, 1))]
    return torch.cat([rows[:, : task.question], *block, rows[:, task.question :]], 1)


def chain_length(size: int) -> int:
    """Return the number of tokens of a chain of thought for factors of `size` digits, "####" included."""
    products = sum(position + size + 1 for position in range(size))
    sums = sum(size + 1 + position + 2 for position in range(1, size - 1))
    return products + sums + size  # size - 1 plus signs, and "####"


def with_chain(task: Task, rows: Tensor) -> Tensor:
    """Return rows of multiplication with the chain of thought of `published_line` between question and product."""
    size, first = task.size, len(task.symbols)
    plus, opening, closing, end = (rows.new_full((len(rows), 1), first + number) for number in range(len(CHAIN)))
    a, b = factors_of(rows, size)
    columns, total = [], torch.zeros_like(a)
    for position, digit in enumerate(digits_of(b, size).unbind(1)):
        total += a * digit * 10**position
        columns += [plus] if position else []
        columns.append(digits_of(a * digit * 10**position, size + 1 + position))
        if 1 <= position <= size - 2:
            columns += [opening, digits_of(total, size + 1 + position), closing]
    columns = [column.to(rows.dtype) for column in columns]
    return torch.cat([rows[:, : task.question], *columns, end, rows[:, task.question :]], 1)


def to_text(task: Task, row: Tensor) -> str:
    """Return a row without pause block as text, with numbers of several digits in the usual order."""
    tokens = row.tolist()
    if task.name == "multiplication":
        size = task.size
        a, b, product = (
            "".join(str(token) if token < 10 else "?" for token in reversed(tokens[start : start + length]))
            for start, length in ((0, size), (size + 1, size), (task.question, task.answer))
        )
        return f"{a} * {b} = {product}"
    return " ".join(task.symbols[token] for token in tokens if task.symbols[token] != "_")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--size", type=cli.int_in(1), default=4, help="digits per factor")
    parser.add_argument("--lines", type=cli.int_in(1), default=10, help="number of lines to print")
    args = parser.parse_args(argv)
    rows = load(build_task("multiplication", args.size), args.lines, None, "cpu").train
    a, b = factors_of(rows, args.size)
    for first, second in zip(a.tolist(), b.tolist(), strict=True):
        print(published_line(first, second, args.size))


if __name__ == "__main__":
    main()
