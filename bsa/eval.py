"""Evaluate a BSA run: write metrics.json, or export its codes and print nearest neighbours and features.

    python bsa/eval.py runs/scratch                                # a finished run of train.py
    python bsa/eval.py runs/mesh --export codes.npz                # bit-packed codes of all rows
    python bsa/eval.py runs/mesh --neighbours "Lung Neoplasms"     # nearest by code and nearest by embedding
    python bsa/eval.py runs/mesh --features 10                     # top concepts of the most active features

Losses are means over test rows. `reconstruction_loss` is 1 - cos(decoder(z), x). `fixed_topk_reconstruction_loss` is
1 - cos(decoder(zK), x), where zK has exactly K ones. With --code topk-values zK is the code itself: at most K positive
values, which neighbours and exports ignore; they use only which features are active. `open_fraction` is the share of s
in (0.1, 0.9). The shares of dead, rare and always-on features are computed over all training rows.

Two metrics depend on the order of the matrix. The kNN overlap compares the first 1,000 test rows with all test rows.
The decoder of the untrained code is fitted to the first 20,000 training rows. So shuffle a matrix sorted by topic.
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
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a script: import from this clone, not from an installed copy
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bsa.planted import planted_concepts
from bsa.train import BSA, Splits, build_model, encode, load_splits, reconstruction_loss, topk_code
from common import checkpoints, cli, devices, files
from common.cli import fail
from common.lock import run_lock
from common.run import check_data, load_finished, read_log, write_metrics

N_QUERIES = 1000  # test rows whose nearest neighbours are compared
KNN_K = 10
CHUNK_ROWS = 1024  # rows that are encoded at once, to limit memory
METRICS_IF_FINITE = (  # null if the run diverged
    "reconstruction_loss", "fixed_topk_reconstruction_loss", "reconstruction_mse", "fixed_topk_reconstruction_mse",
    "active_mean", "active_std", "active_median", "active_min", "active_max", "empty_fraction", "dead_fraction",
    "always_on_fraction", "rare_fraction", "knn_overlap", "fixed_topk_knn_overlap", "bits_per_row",
    "entropy_bits_per_row", "distinct_codes", "open_fraction", "atom_recovery_f1", "depth_correlation",
    "atom_count_correlation", "train_loss", "loss_moved", "reconstruction_loss_moved", "active_mean_moved",
    "settled_step",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.eval_parser(__doc__, "folder of the data, or the matrix file")
    parser.add_argument("--held-out", action="store_true", help="evaluate on the validation split (a held-out tenth of "
                        "the rows), for tuning")  # fmt: skip
    codes = parser.add_argument_group("export and queries (these flags leave metrics.json unchanged)")
    codes.add_argument("--names", type=Path, help="text file with one name per line, one line per row; default: the "
                       "path of the matrix with suffix .txt")  # fmt: skip
    codes.add_argument(
        "--export", type=Path, metavar="FILE.npz", help="write the codes of all rows, 8 features per byte"
    )
    codes.add_argument("--neighbours", metavar="NAME", help=f"{KNN_K} nearest concepts by Jaccard index and by cosine")
    codes.add_argument("--features", type=cli.int_in(1), metavar="COUNT", help="print the top concepts of the COUNT "
                       "most frequently active features")  # fmt: skip
    args = parser.parse_args(argv)
    if args.names and not (args.export or args.neighbours or args.features):
        fail("--names names the codes of --export, --neighbours and --features: give one of them, or drop --names")
    return args


# ------------------------------------------------------------------------------------------------- codes


class Codes(NamedTuple):
    """Pre-rounding code s, code z and top-K code zK (see train.py), (n, N) float32 each. topk-values: zK is z."""

    s: Tensor
    z: Tensor
    zk: Tensor


@torch.no_grad()
def compute_codes(model: BSA, x: Tensor, active: int, code: str) -> Codes:
    """Return the codes of normalised rows x (n, d), computed in float32."""
    h = model.encoder(x)
    s, z = encode(h, active, code)
    return Codes(s, z, z if code == "topk-values" else topk_code(h, active))


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard index |a and b| / |a or b| of each pair of rows of two 0/1 codes (n, N) and (m, N): (n, m).

    The index of two empty codes is 0.
    """
    intersection = a @ b.T
    return intersection / (a.sum(1, keepdim=True) + b.sum(1) - intersection).clamp_min(1)


def pack_bits(z: Tensor) -> np.ndarray:
    """Return codes (n, N) as bits, (n, ceil(N / 8)) uint8. numpy.unpackbits(..., axis=1, count=N) is the inverse."""
    return np.packbits(z.gt(0).cpu().numpy(), axis=1)


# ------------------------------------------------------------------------------------------------- metrics


def reconstruction_losses(model: BSA, x: Tensor, z: Tensor) -> Tensor:
    """Return 1 - cos and the squared error per channel of each row of x (n, d), reconstructed from codes z: (2, n).

    The squared error is hardly informative for models trained with the cosine, which leaves the norm of x^ free.
    """
    x_hat = model.decoder(z)
    return torch.stack([reconstruction_loss(x_hat, x, distance) for distance in ("cosine", "mse")])


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman rank correlation of two vectors (n,). Ties get their mean rank. 0 if a vector is constant."""

    def ranks(values: Tensor) -> Tensor:
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        last_rank = counts.cumsum(0).double()
        return (last_rank - (counts - 1) / 2)[group]

    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def best_match_f1(z: Tensor, atoms: Tensor) -> float:
    """Mean over the true atoms (n, A) of the highest F1 score of any feature of codes z (n, N) for that atom.

    Atoms in fewer than ten rows are left out: about a fifth of the planted atoms, all of them nodes of the tree.
    """
    atoms = atoms[:, atoms.sum(0) >= 10].float()
    is_active = z.gt(0).float()
    f1 = 2 * (atoms.T @ is_active) / (atoms.sum(0)[:, None] + is_active.sum(0)).clamp_min(1)
    return float(f1.max(1).values.mean())


def knn_overlap(x: Tensor, z: Tensor, queries: int) -> float:
    """Share of the ten nearest rows by cosine of x (n, d) that are among the ten nearest by Jaccard index of z (n, N).

    The mean is over the first `queries` rows, so it depends on the order of the rows. Neighbours are searched among all
    other rows of x. Jaccard indices that differ by less than 1e-5 count as ties; the lower row index comes first.
    """
    unit = F.normalize(x, dim=1)
    is_active = z.gt(0).float()
    n_queries, k = min(queries, len(x)), min(KNN_K, len(x) - 1)
    overlap = torch.zeros((), device=x.device)
    # In sparse codes this is smaller than any difference between two Jaccard indices.
    tie_break = torch.arange(len(x), 0, -1, device=x.device) / len(x) * 1e-5
    for rows in torch.arange(n_queries, device=x.device).split(250):
        neighbours = []
        for scores in (unit[rows] @ unit.T, jaccard(is_active[rows], is_active).double() + tie_break):
            scores[torch.arange(len(rows), device=x.device), rows] = -2  # a row is not its own neighbour
            neighbours.append(scores.topk(k, dim=1).indices)
        dense, sparse = neighbours
        overlap += (dense[:, :, None] == sparse[:, None, :]).any(2).float().mean(1).sum()
    return float(overlap) / n_queries


def entropy_bits(frequency: Tensor) -> Tensor:
    """Entropy in bits of independent features that are active with probability `frequency` (N,).

    A code takes at least this many bits on average if its features are independent.
    """
    frequency = frequency.double()
    return (torch.special.entr(frequency) + torch.special.entr(1 - frequency)).sum() / math.log(2)


def storage(active_mean: float, latent: int, frequency: Tensor, with_values: bool) -> dict[str, float]:
    """Return {bits_per_row: min(N, active_mean * ceil(log2 N)), entropy_bits_per_row}.

    `latent` is N. `with_values`: bits_per_row = active_mean * (ceil(log2 N) + 16).
    """
    index_list = active_mean * (math.ceil(math.log2(latent)) + 16 * with_values)
    return {
        "bits_per_row": index_list if with_values else min(float(latent), index_list),
        "entropy_bits_per_row": float(entropy_bits(frequency)),
    }


@torch.no_grad()
def evaluate(
    model: BSA, data: Splits, split: str, active: int, code: str, truth: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return (metrics, activations) on `split`: test or held_out. `activations` is the content of activations.json.

    `truth`: atoms (n, A) bool and depth (n,) of the rows of the split, None if the data are not planted.
    """
    latent = model.encoder.out_features
    x = model.normalise(getattr(data, split))
    chunks = [compute_codes(model, chunk, active, code) for chunk in x.split(CHUNK_ROWS)]
    s, z, zk = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
    counts = z.count_nonzero(1).float()
    uses = torch.zeros(latent, device=x.device)
    for chunk in model.normalise(data.train).split(CHUNK_ROWS):
        uses += compute_codes(model, chunk, active, code).z.count_nonzero(0)
    frequency = uses / len(data.train)
    cosine, mse = reconstruction_losses(model, x, z).mean(1)
    topk_cosine, topk_mse = reconstruction_losses(model, x, zk).mean(1)
    tensors = {
        "reconstruction_loss": cosine,
        "fixed_topk_reconstruction_loss": topk_cosine,
        "reconstruction_mse": mse,
        "fixed_topk_reconstruction_mse": topk_mse,
        "active_mean": counts.mean(),
        "active_std": counts.std(),
        "active_median": counts.median(),
        "active_min": counts.min(),
        "active_max": counts.max(),
        "empty_fraction": (counts == 0).float().mean(),
        "dead_fraction": (frequency == 0).float().mean(),
        "always_on_fraction": (frequency > 0.5).float().mean(),
        "open_fraction": ((s > 0.1) & (s < 0.9)).float().mean(),
        "rare_fraction": (frequency < 0.1 * active / latent).float().mean(),
    }
    metrics = {name: float(value) for name, value in tensors.items()}
    metrics |= storage(metrics["active_mean"], latent, frequency, code == "topk-values")
    metrics["knn_overlap"] = knn_overlap(x, z, N_QUERIES)
    metrics["fixed_topk_knn_overlap"] = knn_overlap(x, zk, N_QUERIES)
    metrics["distinct_codes"] = len(np.unique(pack_bits(z), axis=0)) / len(z)
    if truth:
        atoms, depth = truth
        metrics["atom_recovery_f1"] = best_match_f1(z, atoms)
        metrics["depth_correlation"] = spearman(counts, depth.float())
        metrics["atom_count_correlation"] = spearman(counts, atoms.sum(1).float())
    histogram = torch.bincount(counts.long(), minlength=1).tolist()
    return metrics, {"feature_shares": sorted(frequency.tolist(), reverse=True), "rows_by_active_count": histogram}


@torch.no_grad()
def baselines(model: BSA, data: Splits, split: str, active: int) -> dict[str, float]:
    """Return the metrics of two codes without training, on `split`: test or held_out. `model` must be untrained.

    `untrained_*`: zK of the untrained encoder, with the linear decoder that fits it best (ridge regression on the first
    20,000 training rows, in the order of the matrix). `sign_*`: the sign of every channel, one bit per channel; the
    reconstruction is the signs themselves, without a decoder.
    """
    train = model.normalise(data.train)[:20_000]
    x = model.normalise(getattr(data, split))

    def codes_with_bias(rows: Tensor) -> Tensor:
        zk = torch.cat([topk_code(model.encoder(chunk), active) for chunk in rows.split(CHUNK_ROWS)])
        return torch.cat([zk, rows.new_ones(len(rows), 1)], dim=1)

    train_codes, codes = codes_with_bias(train), codes_with_bias(x)
    # Ridge regression with penalty 1; the primal and the dual form agree, and the smaller system is solved.
    if len(train_codes) > train_codes.shape[1]:
        gram = train_codes.T @ train_codes
        x_hat = codes @ torch.linalg.solve(gram + torch.eye(len(gram), device=x.device), train_codes.T @ train)
    else:
        gram = train_codes @ train_codes.T
        x_hat = codes @ (train_codes.T @ torch.linalg.solve(gram + torch.eye(len(gram), device=x.device), train))
    sign = x.gt(0).float()
    return {
        "untrained_fixed_topk_reconstruction_loss": float(reconstruction_loss(x_hat, x, "cosine").mean()),
        "sign_reconstruction_loss": float(reconstruction_loss(2 * sign - 1, x, "cosine").mean()),
        "sign_knn_overlap": knn_overlap(x, sign, N_QUERIES),
        "sign_bits_per_row": float(x.shape[1]),
    }


def convergence(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the change over the last 20 % of training and the step of convergence, from the lines of train.jsonl.

    `*_moved`: change over the last 20 % of the epochs, in percent of the final value. `settled_step`: from this step
    on, loss and active count changed by less than 1 % over the last 20 % of the epochs so far; None: not converged.
    """
    epochs = [line for line in log if line["epoch"]]

    def change(index: int, name: str) -> float:
        before = epochs[max(0, round((index + 1) * 0.8) - 1)][name]
        return 100 * abs(epochs[index][name] - before) / max(abs(epochs[index][name]), 1e-12)

    converged = [max(change(index, "loss"), change(index, "active_mean")) < 1 for index in range(len(epochs))]
    first = next((index for index in range(4, len(epochs)) if all(converged[index:])), None)
    names = ("loss", "reconstruction_loss", "active_mean")
    changes = {f"{name}_moved": change(len(epochs) - 1, name) for name in names}
    return changes | {"settled_step": None if first is None else epochs[first]["step"]}


# ------------------------------------------------------------------------------------------------- export, queries


def read_names(path: Path | None, data_set: str, data: Path, count: int) -> list[str]:
    """Return the names of all `count` rows from `path` (--names) or, by default, from the .txt file of the matrix.

    Without a file the names are "row 0", "row 1" and so on. Exits with code 2 if the file is not UTF-8 or does not
    contain `count` lines.
    """
    default = data.with_suffix(".txt") if data_set == "file" else data / "mesh-minilm.txt"
    if path is None and (data_set == "planted" or not default.exists()):
        return [f"row {number}" for number in range(count)]
    path = path or default
    try:
        names = files.read_text_lines(path)
    except OSError as error:
        fail(f"--names {path} cannot be read ({error.strerror}): give a text file with one name per line")
    except files.DamagedFile as error:
        fail(f"--names {error}")
    if len(names) != count:
        fail(f"--names {path} contains {len(names)} lines for {count} rows: give one name per line, one line per row")
    return names


@torch.no_grad()
def export_and_print(
    args: argparse.Namespace, model: BSA, rows: Tensor, names: list[str], active: int, code: str
) -> None:
    """Carry out --export, --neighbours and --features; rows (n, d) are raw embeddings."""
    x = model.normalise(rows)
    z = torch.cat([compute_codes(model, chunk, active, code).z for chunk in x.split(CHUNK_ROWS)]).gt(0).float()
    if args.export:
        export(args.export, z, names)
    if args.neighbours:
        print_neighbours(args.neighbours, x, z, names)
    if args.features:
        for feature in z.sum(0).topk(min(args.features, z.shape[1])).indices.tolist():
            logits = torch.cat([model.encoder(chunk)[:, feature] for chunk in x.split(CHUNK_ROWS)])
            top = ", ".join(names[row] for row in logits.topk(min(8, len(names))).indices.tolist())
            print(f"feature {feature}, active in {100 * z[:, feature].mean().item():.1f} % of rows: {top}")


def export(path: Path, z: Tensor, names: list[str]) -> None:
    """Write 0/1 codes z (n, N) and names to an .npz file. Exits with code 2 if it cannot be written."""
    buffer = BytesIO()
    np.savez_compressed(buffer, codes=pack_bits(z), latent=z.shape[1], names=np.array(names))
    try:
        files.write_bytes(path, buffer.getvalue())
    except OSError as error:
        fail(f"--export {path} cannot be written ({error.strerror}): give another file")
    unpack = "numpy.unpackbits(codes, axis=1, count=latent)"
    print(f"{path}: {len(z)} codes of {z.shape[1]} features, with names; unpack with {unpack}")


def print_neighbours(name: str, x: Tensor, z: Tensor, names: list[str]) -> None:
    """Print the nearest rows of the row `name`, by 0/1 codes z (n, N) and by embeddings x (n, d).

    Exits with code 2 if no row has this name.
    """
    if name not in names:
        similar = [other for other in names if name.lower() in other.lower()][:5]
        fail(f"--neighbours {name!r} is not a row name: give a row name (similar: {', '.join(similar) or 'none'})")
    row = names.index(name)
    dense = F.normalize(x, dim=1)
    scores = {"by code (Jaccard)": jaccard(z[row : row + 1], z)[0], "by embedding (cosine)": dense @ dense[row]}
    for title, score in scores.items():
        score[row] = -2  # a row is not its own neighbour
        best = score.topk(min(KNN_K, len(names) - 1))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        print(f"{name}, {title}: " + "; ".join(f"{names[other]} {value:.2f}" for value, other in pairs))


# ------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    arguments, provenance, saved = load_finished(args.folder, __file__)
    log = read_log(args.folder, saved["epoch"])
    epochs = log[1:]
    torch.set_num_threads(args.threads or arguments["threads"])
    device = devices.select_device(args.device or arguments["device"], arguments["scale"])
    started = time.perf_counter()
    data_path = args.data or Path(arguments["data"])
    usage = f"{arguments['latent']} features of all test rows"
    remedy = "use a --device with more memory, or --device cpu (same metrics)"
    with run_lock(args.folder), devices.report_oom(device, usage, remedy):
        data = load_splits(arguments["data_set"], data_path, device, arguments["data_seed"])
        check_data(data.digest, provenance["data"], data_path, args.folder)
        model = build_model(argparse.Namespace(**arguments), data.train.shape[1], device)
        model.mean.copy_(data.train.mean(0))
        active, code = arguments["active"], arguments["code"]
        split = "held_out" if args.held_out else "test"
        codes_only = args.export or args.neighbours or args.features
        untrained = {} if codes_only else baselines(model, data, split, active)
        checkpoints.load_weights(model, saved["model"], args.folder / "model.pt")

        if codes_only:
            indices = torch.cat(data.indices)
            names = read_names(args.names, arguments["data_set"], data_path, data.source_rows)
            # Names are in the order of the source; removed duplicates have no code.
            order = indices.argsort()
            rows = torch.cat([data.train, data.held_out, data.test])[order.to(device)]
            export_and_print(args, model, rows, [names[index] for index in indices[order].tolist()], active, code)
            return

        metrics: dict[str, Any] = {**provenance, **untrained, "diverged": saved["diverged"], "rows": len(data.train)}
        if saved["diverged"]:
            metrics |= dict.fromkeys(METRICS_IF_FINITE)
        else:
            truth = None
            if arguments["data_set"] == "planted":
                planted = planted_concepts(seed=arguments["data_seed"])
                indices = data.indices[1] if args.held_out else data.indices[2]
                atoms, depth = torch.from_numpy(planted.atoms), torch.from_numpy(planted.depth)
                truth = (atoms[indices].to(device), depth[indices].to(device))
            results, activations = evaluate(model, data, split, active, code, truth)
            metrics |= results | convergence(log) | {"train_loss": epochs[-1]["loss"]}
            if not args.held_out:  # the figures show those of the test split
                files.write_json(args.folder / "activations.json", activations)
        metrics |= {
            "examples_per_second": median(line["examples_per_second"] for line in epochs) if epochs else None,
            "peak_memory": epochs[-1]["peak_memory"] if epochs else None,
            "seconds": sum(line["seconds"] for line in epochs) + time.perf_counter() - started,
        }
        write_metrics(args.folder / ("held_out.json" if args.held_out else "metrics.json"), metrics, METRICS_IF_FINITE)


if __name__ == "__main__":
    main()
