"""The three tasks of Seq-VCR: what their tokens are, examples from a seed, and a split that cannot leak.

    python seqvcr/tasks.py --size 4 --lines 3      # multiplication in the published format, chain of thought included

An example is a row of tokens, question and answer. The numbers 0, 1, ... are the first tokens, a task's other symbols
follow, "=" ends every question. Nothing is downloaded: rows are made from the data seed or, as a stream, from a run's
own. Random numbers are drawn on the CPU and the integer arithmetic runs on the device: rows are equal on all devices.

multiplication  of two factors of n digits; all digits least significant first, the product filled up to 2n digits
                (the files of Deng et al. 2023): 9 1 7 3 * 9 4 3 3 = 1 3 9 4 5 4 2 1 is 3719 * 3349 = 12454931
arithmetic      an expression of numbers modulo 11 with n operators, and its value (Feng et al. 2023); filled up between
                expression and "=", so that "=" and answer stand at the same place in every row
lis             n numbers, and the length of their longest increasing subsequence (Feng et al. 2023)

The split is a hash of what must not be in two parts: the unordered pair of factors, the expression whatever its
derivation, the numbers.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import cli, seeding
from common.cli import fail
from common.devices import upload

PAUSES = ("</pause_start>", "<pause>", "</pause_end>")  # the last three tokens of every task
DIGITS = tuple(map(str, range(10)))
MODULUS = 11
PLUS, MINUS, TIMES, OVER, OPEN, CLOSE = range(MODULUS, MODULUS + 6)
FILL = MODULUS + 7  # the token after "="
ATTEMPTS = 16  # drawn at once where an operator may have no solution
LARGEST = 250  # numbers of lis are below it
ROWS = 1 << 16  # drawn at a time


class Task:
    """A task of one size: its tokens, how rows are drawn, and which rows must not be in two parts of the split.

    A row is `question` tokens, then `answer` tokens, uint8; `symbols` are the tokens in words. `held`: thousandths of
    the keys for validation, and for test. `measured`: rows of validation and of test.
    """

    name: str
    sizes: tuple[int, int]  # smallest and largest
    symbols: tuple[str, ...]
    held = 20
    measured = 10_000

    def __init__(self, size: int, question: int, answer: int):
        self.size, self.question, self.answer = size, question, answer

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        """`count` random rows (count, question + answer)."""
        raise NotImplementedError

    def key(self, rows: Tensor) -> Tensor:
        """Equal for rows that must not be in two parts, (count,) int64."""
        return question_key(rows)

    def every(self) -> Tensor | None:
        """All rows there are, None where they are too many to list."""
        return None


def integers(
    low: int, high: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Whole numbers in [low, high), int64 on `device`, drawn on the CPU."""
    return upload(torch.randint(low, high, shape, generator=generator), device)


# ------------------------------------------------------------------------------------------------- multiplication


class Multiplication(Task):
    """Two factors of `size` digits, each uniform with a leading digit that is not zero, and their product."""

    name = "multiplication"
    sizes = (1, 9)
    symbols = (*DIGITS, "*", "=", *PAUSES)
    measured = 1000

    def __init__(self, size: int):
        super().__init__(size, question=2 * size + 2, answer=2 * size)
        self.held = 20 if size > 3 else 100

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        factors = integers(10 ** (self.size - 1), 10**self.size, (2, count), generator, device)
        return product_rows(factors[0], factors[1], self.size)

    def key(self, rows: Tensor) -> Tensor:
        """A number for the unordered pair of factors: a * b and b * a are one."""
        a, b = factors_of(rows, self.size)
        return torch.minimum(a, b) * 10**self.size + torch.maximum(a, b)

    def every(self) -> Tensor | None:
        """All rows up to three digits: 81, 8,100 or 810,000."""
        if self.size > 3:
            return None
        factors = torch.arange(10 ** (self.size - 1), 10**self.size)
        a, b = torch.cartesian_prod(factors, factors).T
        return product_rows(a, b, self.size)


def digits_of(numbers: Tensor, count: int) -> Tensor:
    """The `count` last digits of whole numbers (n,), least significant first: (n, count) int64."""
    return numbers[:, None] // 10 ** torch.arange(count, device=numbers.device) % 10


def product_rows(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Rows of the factors a and b, (n,) int64 each of `size` digits."""
    times, equals = torch.full_like(a, 10)[:, None], torch.full_like(a, 11)[:, None]
    parts = [digits_of(a, size), times, digits_of(b, size), equals, digits_of(a * b, 2 * size)]
    return torch.cat(parts, 1).to(torch.uint8)


def factors_of(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two factors of rows, (n,) int64 each."""
    powers = 10 ** torch.arange(size, device=rows.device)
    return (rows[:, :size] * powers).sum(1), (rows[:, size + 1 : 2 * size + 1] * powers).sum(1)


def published_line(a: int, b: int, size: int) -> str:
    """a * b as in the published files: question, chain of thought (digit by digit of b, with sums), product."""

    def written(number: int, width: int) -> str:
        return " ".join(reversed(f"{number:0{width}d}"))

    terms, total = [], 0
    for place, digit in enumerate(reversed(f"{b:0{size}d}")):
        term = a * int(digit)
        total += term * 10**place
        text = " ".join(["0"] * place + [written(term, size + 1)])
        terms.append(f"{text} ( {written(total, size + 1 + place)} )" if 1 <= place <= size - 2 else text)
    return f"{written(a, size)} * {written(b, size)}||{' + '.join(terms)} #### {written(a * b, 2 * size)}"


def read_published(path: Path, size: int) -> Tensor:
    """The distinct rows of a file in the published format, uint8. Stops (exit 2) with the first line that is not."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data-file {path} cannot be read ({getattr(error, 'strerror', None) or error})")
    if lines and lines[0].startswith("version https://git-lfs"):
        fail(f"--data-file {path} is a Git-LFS pointer, not the data: fetch the file itself (git lfs pull)")
    factor, product = (rf"(\d(?: \d){{{count - 1}}})" for count in (size, 2 * size))
    pattern = re.compile(rf"{factor} \* {factor}\|\|.*#### {product}")
    pairs = []
    for number, line in enumerate(lines, 1):
        found = pattern.fullmatch(line.rstrip())
        a, b, answer = (int(text.replace(" ", "")[::-1]) for text in found.groups()) if found else (0, 0, -1)
        if a * b != answer:
            wrong = f"says {a} * {b} = {answer}" if found else f"is not `a * b||... #### product` with {size} digits"
            fail(f"--data-file {path}, line {number} {wrong} (digits least significant first): {line[:60]!r}")
        pairs.append((a, b))
    if not pairs:
        fail(f"--data-file {path} is empty")
    factors = torch.tensor(list(dict.fromkeys(pairs)))
    return product_rows(factors[:, 0], factors[:, 1], size)


# ------------------------------------------------------------------------------------------------- arithmetic


class Arithmetic(Task):
    """Expressions modulo 11 with `size` operators; in training also with fewer, 1..size in shares of i / sum(i)."""

    name = "arithmetic"
    sizes = (1, 50)
    symbols = (*DIGITS, "10", "+", "-", "*", "/", "(", ")", "=", "_", *PAUSES)

    def __init__(self, size: int):
        super().__init__(size, question=4 * size, answer=1)

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        tokens = torch.full((count, 4 * self.size - 1), FILL, device=device)
        tokens[:, 0] = answer = integers(0, MODULUS, (count,), generator, device)
        operators = torch.full((count,), self.size, device=device)
        if training:
            shares = torch.arange(1, self.size + 1, device=device).cumsum(0)
            drawn = integers(0, self.size * (self.size + 1) // 2, (count,), generator, device)
            operators = torch.searchsorted(shares, drawn, right=True) + 1
        for step in range(self.size):
            tokens = torch.where((step < operators)[:, None], grow(tokens, step + 1, generator), tokens)
        return torch.cat([tokens, torch.full_like(tokens[:, :1], FILL - 1), answer[:, None]], 1).to(torch.uint8)


def grow(tokens: Tensor, numbers: int, generator: torch.Generator) -> Tensor:
    """One derivation step of expressions (n, width) with `numbers` numbers: one of them, chosen at random, becomes
    `a operator b` of the same value modulo 11, in brackets where precedence needs them. Nothing is divided by zero."""
    device, width, one = tokens.device, tokens.shape[1], (len(tokens), 1)
    chosen = integers(1, numbers + 1, one, generator, device)
    is_number = tokens < MODULUS
    place = (is_number & (is_number.cumsum(1) == chosen)).int().argmax(1, keepdim=True)
    value = tokens.gather(1, place)

    many = (len(tokens), ATTEMPTS)
    operator = integers(PLUS, OVER + 1, many, generator, device)
    operator[:, -1] = PLUS  # always has a solution: 15 failures before it have a probability below 1e-8
    a = integers(0, MODULUS, many, generator, device)
    solved = (operator < TIMES) | ((a != 0) & ((operator == TIMES) | (value != 0)))
    first = solved.int().argmax(1, keepdim=True)
    operator, a = operator.gather(1, first), a.gather(1, first)
    b = torch.where(operator == PLUS, value - a, a - value)
    b = torch.where(operator == TIMES, value * a ** (MODULUS - 2), b)  # Fermat: the power is the inverse
    b = torch.where(operator == OVER, a * value ** (MODULUS - 2), b) % MODULUS

    left = torch.where(place > 0, tokens.gather(1, (place - 1).clamp(min=0)), FILL)
    right = torch.where(place + 1 < width, tokens.gather(1, (place + 1).clamp(max=width - 1)), FILL)
    beside = (left == TIMES) | (left == MINUS) | (right == TIMES) | (right == OVER)
    brackets = (left == OVER) | ((operator < TIMES) & beside)
    bare = torch.cat([a, operator, b, b, b], 1)
    wrapped = torch.cat([torch.full_like(a, OPEN), a, operator, b, torch.full_like(a, CLOSE)], 1)
    piece, length = torch.where(brackets, wrapped, bare), torch.where(brackets, 5, 3)
    column = torch.arange(width, device=device).expand_as(tokens)
    shifted = tokens.gather(1, torch.where(column < place, column, (column - length + 1).clamp(min=0)))
    inside = (column >= place) & (column < place + length)
    return torch.where(inside, piece.gather(1, (column - place).clamp(0, 4)), shifted)


# ------------------------------------------------------------------------------------------------- lis


class LIS(Task):
    """`size` numbers, and the length of their longest increasing subsequence.

    The numbers are above `size`, since the tokens up to it are answers. They are noise in which one to three increasing
    runs are planted, each at a random share of the places.
    """

    name = "lis"
    sizes = (2, 200)
    symbols = (*map(str, range(LARGEST)), "=", *PAUSES)

    def __init__(self, size: int):
        super().__init__(size, question=size + 1, answer=1)

    def draw(self, generator: torch.Generator, count: int, device: torch.device | str, training: bool) -> Tensor:
        shape = (count, self.size)
        numbers = integers(self.size + 1, LARGEST, shape, generator, device)
        runs = integers(1, 4, (count, 1), generator, device)
        for run in range(3):
            share = torch.rand((count, 1), generator=generator)
            here = upload(torch.rand(shape, generator=generator) < share, device) & (run < runs)
            fresh = integers(self.size + 1, LARGEST, shape, generator, device)
            rising = torch.where(here, fresh, LARGEST).sort(1).values
            numbers = torch.where(here, rising.gather(1, (here.cumsum(1) - 1).clamp(min=0)), numbers)
        equals = torch.full_like(numbers[:, :1], LARGEST)
        return torch.cat([numbers, equals, longest_increasing(numbers)[:, None]], 1).to(torch.uint8)


def longest_increasing(numbers: Tensor) -> Tensor:
    """Length of the longest strictly increasing subsequence of each row (n, size): (n,), by patience sorting."""
    tails = torch.full_like(numbers, torch.iinfo(numbers.dtype).max)  # smallest last number of a subsequence, by length
    for column in range(numbers.shape[1]):
        number = numbers[:, column : column + 1].contiguous()
        tails.scatter_(1, torch.searchsorted(tails, number), number)
    return (tails < torch.iinfo(numbers.dtype).max).sum(1)


def choose(name: str, size: int) -> Task:
    """The task `name`: factors of `size` digits, `size` operators, or `size` numbers. Stops (exit 2) at a bad size."""
    task = {"multiplication": Multiplication, "arithmetic": Arithmetic, "lis": LIS}[name]
    least, most = task.sizes
    if not least <= size <= most:
        fail(f"--size {size} is no size of --task {name}: give {least} to {most}")
    return task(size)


# ------------------------------------------------------------------------------------------------- split


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap as unsigned ones do."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def question_key(rows: Tensor) -> Tensor:
    """A hash of the tokens of a question and their places, (n,) int64; the answer, one token, is left out."""
    tokens = rows[:, :-1].long()
    return mixed(mixed(tokens + 256 * torch.arange(1, tokens.shape[1] + 1, device=rows.device)).sum(1))


def part_of(task: Task, rows: Tensor) -> Tensor:
    """0 for rows of training, 1 of validation, 2 of test; (n,) int64."""
    bucket = (mixed(task.key(rows) + seeding.DATA_SEED) >> 1 & (1 << 62) - 1) % 1000
    return (bucket < 2 * task.held).long() + (bucket < task.held).long()


class Examples(NamedTuple):
    """Rows of the three parts, (n, question + answer) uint8; no key is in two of them."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(task: Task, count: int, file: Path | None, device: torch.device | str) -> Examples:
    """At most `count` distinct training rows, from the data seed or of a published file, and those to measure on."""
    every = task.every()
    if every is not None:
        rows = every.to(device)
        parts = [rows[part_of(task, rows) == part] for part in range(3)]
        orders = [
            seeding.permutation(seeding.DATA_SEED, "examples", part, len(parts[part]), device) for part in range(3)
        ]
        train, validation, test = (rows[order] for rows, order in zip(parts, orders, strict=True))
    else:
        train = distinct(task, 0, 0 if file else count, device)
        validation, test = (distinct(task, part, task.measured, device) for part in (1, 2))
    if file:
        rows = read_published(file, task.size).to(device)
        train = rows[part_of(task, rows) == 0]
        print(f"{file}: {len(rows)} different lines; {len(rows) - len(train)} fall into validation or test", flush=True)
    return Examples(train[:count], validation[: task.measured], test[: task.measured])


def distinct(task: Task, part: int, count: int, device: torch.device | str) -> Tensor:
    """`count` different rows of a part, fewer where drawing on finds hardly any new ones.

    Training on expressions: the first `count` draws mix numbers of operators, what repeats is made up for by long ones.
    """
    rows = torch.zeros((0, task.question + task.answer), dtype=torch.uint8, device=device)
    drawn = 0
    while len(rows) < count:
        before = len(rows)
        generator = seeding.generator(seeding.DATA_SEED, f"{task.name} of part {part}", drawn)
        fresh = task.draw(generator, ROWS, device, part == 0 and drawn < count)
        rows = torch.cat([rows, fresh[part_of(task, fresh) == part]])
        drawn += ROWS
        keys, place = task.key(rows).unique(return_inverse=True)
        first = torch.full_like(keys, len(rows)).scatter_reduce_(
            0, place, torch.arange(len(rows), device=device), "amin"
        )
        rows = rows[first.sort().values]
        if len(rows) - before < ROWS // 5000:
            break
    return rows[:count]


def stream(task: Task, seed: int, step: int, count: int, device: torch.device | str) -> Tensor:
    """`count` fresh training rows of this step, whatever was drawn before. No host-device synchronisation."""
    generator = seeding.generator(seed, f"stream of {task.name}", step)
    rows = task.draw(generator, 2 * count + 64, device, True)  # 4 in 5 are kept at least
    kept = (part_of(task, rows) == 0).int()
    return rows[kept.argsort(descending=True, stable=True)[:count]]


# ------------------------------------------------------------------------------------------------- layout


def with_pauses(task: Task, rows: Tensor, pause: int) -> Tensor:
    """Rows with the pause block between question and answer: start, `pause` equal tokens, end; nothing at 0."""
    if not pause:
        return rows
    start = len(task.symbols) - len(PAUSES)
    block = [rows.new_full((len(rows), count), start + number) for number, count in enumerate((1, pause, 1))]
    return torch.cat([rows[:, : task.question], *block, rows[:, task.question :]], 1)


def readable(task: Task, row: Tensor) -> str:
    """A row without its pause block, numbers of several digits as people write them."""
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
    parser.add_argument("--size", type=cli.int_min(1), default=4, help="digits of a factor")
    parser.add_argument("--lines", type=cli.int_min(1), default=10)
    args = parser.parse_args(argv)
    rows = load(choose("multiplication", args.size), args.lines, None, "cpu").train
    for a, b in zip(*(one.tolist() for one in factors_of(rows, args.size)), strict=True):
        print(published_line(a, b, args.size))


if __name__ == "__main__":
    main()
