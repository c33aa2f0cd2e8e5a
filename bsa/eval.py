"""What a BSA run's codes are worth, written to metrics.json; and its codes, neighbours and features to look at.

    python bsa/eval.py runs/scratch                                # a finished run of train.py
    python bsa/eval.py runs/mesh --export codes.npz                # bit-packed codes of all rows
    python bsa/eval.py runs/mesh --neighbours "Lung Neoplasms"     # nearest by code, beside nearest by embedding
    python bsa/eval.py runs/mesh --features 10                     # top concepts of the most used features

Losses are means over test rows: `reconstruction_loss` is 1 - cos of the row and what the decoder makes of its code z,
`fixed_topk_reconstruction_loss` the same from zK, exactly K features on, whatever the arm was trained with. Shares of
features (dead, rare, always on) are over all training rows.
"""

import argparse
import math
import sys
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if not __package__:  # a script takes its own clone, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.planted import plant
from bsa.train import BSA, Rows, build_model, encode, load_rows, reconstruction_loss, topk_code
from common import checkpoints, cli, devices, files
from common.cli import fail
from common.lock import run_lock
from common.run import load_finished

PROBED = 1000  # test rows whose neighbours are compared
NEAREST = 10
METRICS_IF_FINITE = (  # of a diverged run they are null
    *("reconstruction_loss", "fixed_topk_reconstruction_loss", "reconstruction_mse", "fixed_topk_reconstruction_mse"),
    *("active_mean", "active_std", "active_median", "active_min", "active_max", "empty_fraction", "dead_fraction"),
    *("always_on_fraction", "rare_fraction", "knn_overlap", "bits_per_row", "entropy_bits_per_row", "distinct_codes"),
    *("open_fraction", "atom_recovery_f1", "depth_correlation", "atom_count_correlation", "train_loss"),
    *("loss_moved", "reconstruction_loss_moved", "active_mean_moved", "settled_step"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("--data", type=Path, help="folder of the data, or the matrix; default: as in training")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: as in training")
    parser.add_argument("--threads", type=cli.int_min(1), help="default: as in training")
    parser.add_argument("--held-out", action="store_true", help="measure on the held-out tenth: for tuning")
    use = parser.add_argument_group("use of the codes (metrics.json stays as it is)")
    use.add_argument("--names", type=Path, help="one name a line, as many as rows; default: beside the matrix, .txt")
    use.add_argument("--export", type=Path, metavar="FILE.npz", help="write all rows' codes, eight features a byte")
    use.add_argument("--neighbours", metavar="NAME", help=f"{NEAREST} nearest concepts by Jaccard index and by cosine")
    use.add_argument("--features", type=cli.int_min(1), metavar="COUNT", help="the most used features' top concepts")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- codes


class Codes(NamedTuple):
    """Of n rows: s and z (n, N), and zK (n, N); float32 on the device."""

    s: Tensor
    z: Tensor
    fixed: Tensor


@torch.no_grad()
def codes_of(model: BSA, x: Tensor, active: int, code: str) -> Codes:
    """The codes of normalised rows x (n, d), in float32."""
    h = model.encoder(x)
    s, z = encode(h, active, code)
    fixed = z if code == "topk-values" else topk_code(h, active)
    return Codes(s, z, fixed)


def blocks(rows: Tensor, size: int = 1024) -> tuple[Tensor, ...]:
    """Rows (n, d) in pieces, so that their codes fit in memory."""
    return rows.split(size)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a and b| / |a or b| of the rows of two codes (n, N) and (m, N) of zeros and ones: (n, m); 0 for empty codes."""
    both = a @ b.T
    return both / (a.sum(1, keepdim=True) + b.sum(1) - both).clamp_min(1)


def packed(z: Tensor) -> np.ndarray:
    """Codes (n, N) as bits, (n, ceil(N / 8)) uint8; numpy.unpackbits(..., axis=1, count=N) undoes it."""
    return np.packbits(z.gt(0).cpu().numpy(), axis=1)


# ------------------------------------------------------------------------------------------------- measures


def rebuilding(model: BSA, x: Tensor, z: Tensor) -> Tensor:
    """(1 - cos, squared error per channel) between rows x (n, d), whose channels have mean square 1, and their codes'
    reconstruction: (2, n). Where a loss leaves the length open (the cosine), the squared error says little."""
    rebuilt = model.decoder(z)
    return torch.stack([reconstruction_loss(rebuilt, x, kind) for kind in ("cosine", "mse")])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors, ties sharing their mean rank; 0 where one is constant."""

    def ranks(values: Tensor) -> Tensor:
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        return (last - (counts - 1) / 2)[group]

    centred = [ranks(x) - ranks(x).mean() for x in (a, b)]
    scale = (centred[0].norm() * centred[1].norm()).clamp_min(1e-12)
    return float((centred[0] * centred[1]).sum() / scale)


def best_match_f1(z: Tensor, atoms: Tensor) -> float:
    """Mean over the true atoms (n, A) of the best F1 that any feature of the codes (n, N) reaches as its detector.

    Atoms in fewer than ten of the rows are left out.
    """
    atoms = atoms[:, atoms.sum(0) >= 10].float()
    on = z.gt(0).float()
    f1 = 2 * (atoms.T @ on) / (atoms.sum(0)[:, None] + on.sum(0)).clamp_min(1)
    return float(f1.max(1).values.mean())


def knn_overlap(x: Tensor, z: Tensor, queries: int) -> float:
    """Share of the ten nearest rows by cosine of x (n, d) that are among the ten nearest by Jaccard index of z (n, N).

    The first `queries` rows ask, all rows answer, a row itself left out. Of equal indices the lower row number wins.
    """
    unit, on = torch.nn.functional.normalize(x, dim=1), z.gt(0).float()
    shared = torch.zeros((), device=x.device)
    # less than indices differ by, as long as codes are sparse
    favour = torch.arange(len(x), 0, -1, device=x.device) / len(x) * 1e-5
    for numbers in torch.arange(min(queries, len(x)), device=x.device).split(250):
        near = []
        for scores in (unit[numbers] @ unit.T, jaccard(on[numbers], on).double() + favour):
            scores[torch.arange(len(numbers), device=x.device), numbers] = -2
            near.append(scores.topk(min(NEAREST, len(x) - 1), dim=1).indices)
        shared += (near[0][:, :, None] == near[1][:, None, :]).any(2).float().mean(1).sum()
    return float(shared) / min(queries, len(x))


def entropy_bits(share: Tensor) -> Tensor:
    """Entropy in bits of features that are on with probability `share` (N,): what a code needs at least, if they are
    independent."""
    share = share.double()
    return (torch.special.entr(share) + torch.special.entr(1 - share)).sum() / math.log(2)


def storage(active_mean: float, latent: int, share: Tensor, values: bool) -> dict[str, float]:
    """Bits a row takes: as a bitmap or as a list of numbers of features, whichever is less (16 more for each value)."""
    listed = active_mean * (math.ceil(math.log2(latent)) + 16 * values)
    return {
        "bits_per_row": listed if values else min(float(latent), listed),
        "entropy_bits_per_row": float(entropy_bits(share)),
    }


@torch.no_grad()
def evaluate(
    model: BSA, data: Rows, part: str, active: int, code: str, truth: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(metrics, the distribution of activations). `truth`: atoms (n, A) bool and depth (n,) of the measured rows."""
    latent = model.encoder.out_features
    x = model.normalise(data.held_out if part == "held_out" else data.test)
    s, z, fixed = (
        torch.cat(parts) for parts in zip(*(codes_of(model, b, active, code) for b in blocks(x)), strict=True)
    )
    counts = z.count_nonzero(1).float()
    used = torch.zeros(latent, device=x.device)
    for block in blocks(model.normalise(data.train)):
        used += codes_of(model, block, active, code).z.count_nonzero(0)
    share = used / len(data.train)
    whole, cut = rebuilding(model, x, z).mean(1), rebuilding(model, x, fixed).mean(1)
    metrics = {
        "reconstruction_loss": whole[0], "fixed_topk_reconstruction_loss": cut[0], "reconstruction_mse": whole[1],
        "fixed_topk_reconstruction_mse": cut[1], "active_mean": counts.mean(), "active_std": counts.std(),
        "active_median": counts.median(), "active_min": counts.min(), "active_max": counts.max(),
        "empty_fraction": (counts == 0).float().mean(), "dead_fraction": (share == 0).float().mean(),
        "always_on_fraction": (share > 0.5).float().mean(), "open_fraction": ((s > 0.1) & (s < 0.9)).float().mean(),
        "rare_fraction": (share < 0.1 * active / latent).float().mean(),
    }  # fmt: skip
    found = {name: float(value) for name, value in metrics.items()}
    found |= storage(found["active_mean"], latent, share, code == "topk-values")
    found["knn_overlap"] = knn_overlap(x, z, PROBED)
    found["distinct_codes"] = len(np.unique(packed(z), axis=0)) / len(z)
    if truth:
        atoms, depth = truth
        found["atom_recovery_f1"] = best_match_f1(z, atoms)
        found["depth_correlation"] = spearman(counts, depth.float())
        found["atom_count_correlation"] = spearman(counts, atoms.sum(1).float())
    histogram = torch.bincount(counts.long(), minlength=1).tolist()
    return found, {"feature_shares": sorted(share.tolist(), reverse=True), "rows_by_active_count": histogram}


@torch.no_grad()
def references(model: BSA, data: Rows, part: str, active: int) -> dict[str, float]:
    """What codes are worth that nobody trained, on the measured rows.

    `untrained_*`: zK of the encoder at its start, with the best linear decoder for it (least squares on at most 20,000
    training rows). `sign_*`: the sign of every channel, a bit each.
    """
    train, x = model.normalise(data.train)[:20_000], model.normalise(data.held_out if part == "held_out" else data.test)

    def code(rows: Tensor) -> Tensor:
        fixed = torch.cat([topk_code(model.encoder(block), active) for block in blocks(rows)])
        return torch.cat([fixed, rows.new_ones(len(rows), 1)], dim=1)

    known, asked = code(train), code(x)
    if len(known) > known.shape[1]:  # ridge of 1, over features or over rows, whichever are fewer
        gram = known.T @ known
        rebuilt = asked @ torch.linalg.solve(gram + torch.eye(len(gram), device=x.device), known.T @ train)
    else:
        gram = known @ known.T
        rebuilt = asked @ (known.T @ torch.linalg.solve(gram + torch.eye(len(gram), device=x.device), train))
    sign = x.gt(0).float()
    return {
        "untrained_fixed_topk_reconstruction_loss": float(reconstruction_loss(rebuilt, x, "cosine").mean()),
        "sign_reconstruction_loss": float(reconstruction_loss(2 * sign - 1, x, "cosine").mean()),
        "sign_knn_overlap": knn_overlap(x, sign, PROBED),
        "sign_bits_per_row": float(x.shape[1]),
    }


def movement(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """How much loss, reconstruction loss and active count moved over the last fifth, in percent of their last values;
    and the step from which on loss and active count had moved by less than 1 % over the fifth before (None: never)."""
    epochs = [line for line in log if line["epoch"]]

    def moved(place: int, name: str) -> float:
        before = epochs[max(0, round((place + 1) * 0.8) - 1)][name]
        return 100 * abs(epochs[place][name] - before) / max(abs(epochs[place][name]), 1e-12)

    still = [max(moved(place, "loss"), moved(place, "active_mean")) < 1 for place in range(len(epochs))]
    settled = next((place for place in range(4, len(epochs)) if all(still[place:])), None)
    found = {f"{name}_moved": moved(len(epochs) - 1, name) for name in ("loss", "reconstruction_loss", "active_mean")}
    return found | {"settled_step": None if settled is None else epochs[settled]["step"]}


# ------------------------------------------------------------------------------------------------- use


def read_names(given: Path | None, data_set: str, data: Path, count: int) -> list[str]:
    """The rows' names, or their numbers where there is no file. Stops (exit 2) where there are not `count`."""
    path = given or (data.with_suffix(".txt") if data_set == "file" else data / "mesh-minilm.txt")
    if given is None and (data_set == "planted" or not path.exists()):
        return [f"row {number}" for number in range(count)]
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"--names {path} cannot be read ({error.strerror})")
    if len(names) != count:
        fail(f"--names {path} has {len(names)} lines for {count} rows: one name a line is needed")
    return names


@torch.no_grad()
def look(args: argparse.Namespace, model: BSA, raw: Tensor, names: list[str], active: int, code: str) -> None:
    """Answer --export, --neighbours and --features for all rows, raw (n, d)."""
    x = model.normalise(raw)
    z = torch.cat([codes_of(model, block, active, code).z for block in blocks(x)]).gt(0).float()
    if args.export:
        whole = BytesIO()
        np.savez_compressed(whole, codes=packed(z), latent=z.shape[1], names=np.array(names))
        try:
            files.write_bytes(args.export, whole.getvalue())
        except OSError as error:
            fail(f"--export {args.export} cannot be written ({error.strerror})")
        print(f"{args.export}: {len(z)} codes of {z.shape[1]} features, names; numpy.unpackbits(codes, axis=1)")
    if args.neighbours:
        if args.neighbours not in names:
            near = [name for name in names if args.neighbours.lower() in name.lower()][:5]
            fail(f"--neighbours {args.neighbours!r} is no name of a row; near it: {', '.join(near) or 'none'}")
        row = names.index(args.neighbours)
        dense = torch.nn.functional.normalize(x, dim=1)
        scores = {"by code (Jaccard)": jaccard(z[row : row + 1], z)[0], "by embedding (cosine)": dense @ dense[row]}
        for title, score in scores.items():
            score[row] = -2
            best = score.topk(min(NEAREST, len(names) - 1))
            print(f"{args.neighbours}, {title}: " + "; ".join(
                f"{names[place]} {value:.2f}" for value, place in zip(*(part.tolist() for part in best), strict=True)
            ))  # fmt: skip
    if args.features:
        for feature in z.sum(0).topk(min(args.features, z.shape[1])).indices.tolist():
            logits = torch.cat([model.encoder(block)[:, feature] for block in blocks(x)])
            top = ", ".join(names[row] for row in logits.topk(min(8, len(names))).indices.tolist())
            print(f"feature {feature}, on in {100 * z[:, feature].mean().item():.1f} % of rows: {top}")


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    arguments, facts, saved = load_finished(args.folder, "bsa/train.py")
    try:
        log = files.read_lines(args.folder / "train.jsonl")
        epochs = [line for line in log if line["epoch"]]
        if not epochs and not saved["diverged"]:
            raise files.DamagedFile("it is empty")
    except (files.DamagedFile, KeyError) as error:
        fail(f"{args.folder / 'train.jsonl'} is damaged ({error}): move {args.folder} away and train this run again")
    torch.set_num_threads(args.threads or arguments["threads"])
    device = devices.select_device(args.device or arguments["device"], arguments["scale"])
    started, folder = time.perf_counter(), args.data or Path(arguments["data"])
    elsewhere = "A --device with more memory, or --device cpu, gives the same metrics"
    with (
        run_lock(args.folder),
        devices.memory_for(device, f"{arguments['latent']} features of all test rows", elsewhere),
    ):
        data = load_rows(arguments["data_set"], folder, device)
        if data.digest != facts["data"]:
            fail(f"--data {folder} is not what {args.folder} was trained on (digest {data.digest[:12]}): give that")
        model = build_model(argparse.Namespace(**arguments), data.train.shape[1], device)
        model.mean.copy_(data.train.mean(0))
        active, code = arguments["active"], arguments["code"]
        part, numbers = ("held_out", data.numbers[1]) if args.held_out else ("test", data.numbers[2])
        looking = args.export or args.neighbours or args.features
        untrained = {} if looking else references(model, data, part, active)
        checkpoints.fit(model, saved["model"], args.folder / "model.pt")
        if looking:
            order = torch.cat(data.numbers).argsort().to(device)
            count = 1 + max(int(rows.max()) for rows in data.numbers)
            names = read_names(args.names, arguments["data_set"], folder, count)
            kept = torch.cat(data.numbers).sort().values.tolist()
            raw = torch.cat([data.train, data.held_out, data.test])[order]
            look(args, model, raw, [names[row] for row in kept], active, code)
            return
        metrics: dict[str, Any] = {**facts, **untrained, "diverged": saved["diverged"], "rows": len(data.train)}
        if saved["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            truth = None
            if arguments["data_set"] == "planted":
                planted = plant()
                truth = tuple(torch.from_numpy(one)[numbers].to(device) for one in (planted.atoms, planted.depth))
            found, activations = evaluate(model, data, part, active, code, truth)
            metrics |= found | movement(log) | {"train_loss": epochs[-1]["loss"]}
            files.write_json(args.folder / "activations.json", activations)
        metrics |= {
            "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
            "peak_memory": epochs[-1]["peak_memory"] if epochs else None,
            "seconds": sum(line["seconds"] for line in epochs) + time.perf_counter() - started,
        }
        files.write_json(args.folder / ("held_out.json" if args.held_out else "metrics.json"), metrics)
        shown = (f"{name} {metrics[name]:.4g}" for name in METRICS_IF_FINITE if metrics.get(name) is not None)
        print(f"{args.folder}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
