"""One training step of each paper, with the same weights and the same batch on each device, for gpu_check."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bsa.train
import cocord.train
import conmim.train
import seqvcr.train
import simsiam.train
from cocord import net
from common import devices, images, seeding
from common.devices import upload
from seqvcr import tasks

CPU = torch.device("cpu")


class Problem(NamedTuple):
    """A model, its optimiser, its loss on a fixed batch (a function of --precision) and the EMA update after a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[str], Tensor]
    ema_update: Callable[[], None]

    def gradients(self, precision: str) -> tuple[float, dict[str, Tensor]]:
        """Return the loss, and the gradients by parameter name, in float64 on the CPU."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(precision)
        loss.backward()
        gradients = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        return loss.item(), {name: gradient.detach().cpu().double() for name, gradient in gradients.items()}

    def step(self, precision: str) -> Tensor:
        """Perform one training step. Returns the loss on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(precision)
        loss.backward()
        self.optimizer.step()
        self.ema_update()
        return loss.detach()


def random_images(count: int, size: int, classes: int, device: torch.device) -> images.Images:
    """Return a data set of random pixels, with labels 0, 1, ..., classes - 1, 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.arange(count, device=device) % classes
    mean = torch.full((3, 1, 1), 0.5, device=device)
    return images.Images(pixels, labels, pixels, labels, classes, mean, mean / 2, "")


def simsiam_problem(scale: str, rows: int, device: torch.device) -> Problem:
    args = simsiam.train.parse_args(["--scale", scale])
    args.batch, args.lr = rows, 0.05 * 256 / rows
    views = next(simsiam.train.batches(args, random_images(rows, args.size, 10, CPU), 0, slice(0, rows)))
    views = [upload(view, device) for view in views]
    model = simsiam.train.build_model(args, device)
    optimizer = simsiam.train.build_optimizer(args, model)

    def loss(precision: str) -> Tensor:
        pairs = simsiam.train.PAIRS[args.loss]
        with devices.autocast(precision, device):
            p, z = model(views, pairs, args.gradient_leak)
        return simsiam.train.simsiam_loss(p, z, pairs, args.gradient_leak)

    return Problem(model, optimizer, loss, lambda: None)


def conmim_problem(scale: str, rows: int, device: torch.device) -> Problem:
    args = conmim.train.parse_args(["--scale", scale, "--batch", str(rows)])
    loader = conmim.train.batches(args, random_images(rows, args.size, 10, CPU), 0, slice(0, rows))
    query, key, mask = (upload(tensor, device) for tensor in next(loader))
    model = conmim.train.build_model(args, device)
    ema, online = list(model.ema.parameters()), list(model.online.parameters())

    def loss(precision: str) -> Tensor:
        with devices.autocast(precision, device):
            q, k = model(query, key, mask, args.keys, args.gradient_leak)
        return conmim.train.denoising_contrast(q, k, mask, args.temperature)

    optimizer = conmim.train.build_optimizer(args, model)
    return Problem(model, optimizer, loss, lambda: conmim.train.ema_update(ema, online, args.momentum))


def cocord_problem(scale: str, rows: int, device: torch.device) -> Problem:
    """At `paper` scale the pair with the largest networks is used: teacher ResNet50, student vgg8."""
    networks = ["--teacher", "ResNet50", "--student", "vgg8"] if scale == "paper" else []
    args = cocord.train.parse_args(["--scale", scale, *networks, "--queue", str(max(rows, 512)), "--batch", str(rows)])
    views, labels = next(cocord.train.batches(args, random_images(rows, 32, 36, CPU), 0))
    (x, swapped_x, teacher_x), labels = [upload(view, device) for view in views], upload(labels, device)
    with seeding.seeded_fork_rng(0, "teacher"):
        teacher = net.build(args.teacher, 36).eval().requires_grad_(False)
    teacher = net.fold_batch_norms(teacher.to(memory_format=torch.channels_last).to(device))
    model = cocord.train.build_model(args, 36, device)
    optimizer = cocord.train.build_optimizer(args, [model.student, model.head, model.predictor])
    (slow_weights, online_weights), (teacher_head_weights, head_weights) = model.ema_pairs()

    def loss(precision: str) -> Tensor:
        """Return the loss. The EMA updates come between the student's forward pass and the targets."""
        with devices.autocast(precision, device):
            feature, logits = model.student(x)
            z = model.head(feature)
            p, swapped_p = model.predictor(z), model.predictor(model.head(model.student(swapped_x)[0]))
        cocord.train.ema_update(slow_weights, online_weights, args.student_momentum)
        cocord.train.ema_update(teacher_head_weights, head_weights, args.teacher_momentum)
        with torch.no_grad(), devices.autocast(precision, device):
            u, swapped_u = (model.slow_head(model.slow_student(view)[0]) for view in (swapped_x, x))
            keys = cocord.train.make_keys(model, teacher, teacher_x)
        return cocord.train.cocord_loss(
            logits=logits, labels=labels, z=z, keys=keys, queue=model.queue, p=p, u=u, swapped_p=swapped_p,
            swapped_u=swapped_u, teacher_logits=torch.empty(0),
            forward_weight=args.forward_weight, swapped_weight=args.swapped_weight,
            lambda_contrast=args.lambda_contrast, lambda_class=args.lambda_class, lambda_kd=0.0,
            temperature=args.temperature,
        )[0]  # fmt: skip

    return Problem(model, optimizer, loss, lambda: None)


def bsa_problem(scale: str, rows: int, device: torch.device) -> Problem:
    """Excludes rows whose code rounding could change: a logit is near 0, or the K-th and next largest are close."""
    data = ["--data", "matrix.npy"] if scale == "paper" else []
    args = bsa.train.parse_args(["--scale", scale, *data])
    width = {"demo": 128, "gpu": 384, "paper": 768}[scale]
    model = bsa.train.build_model(args, width, device)
    x = bsa.train.BSA(width, 2, 1, "torch", 0).normalise(
        torch.randn(8 * rows, width, generator=seeding.generator(0, "x", 0))
    )
    if scale != "paper":
        h = bsa.train.build_model(args, width, CPU).encoder(x).detach()
        top = h.topk(args.active + 1, dim=1).values
        stable = (h.abs().amin(1) > 1e-2) & (top[:, -2] - top[:, -1] > 1e-3)
        x = x[stable]
        assert len(x) >= rows, f"only {len(x)} of {rows} rows are stable under rounding"
    x = upload(x[:rows].contiguous(), device)

    def loss(precision: str) -> Tensor:
        return bsa.train.bsa_loss(
            model, x, active=args.active, alpha=args.alpha, reconstruction=args.reconstruction,
            alignment=args.alignment, target=args.target, reduction=args.mse_reduction, code=args.code,
            precision=precision,
        )[0]  # fmt: skip

    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    return Problem(model, optimizer, loss, lambda: None)


def seqvcr_problem(scale: str, rows: int, device: torch.device) -> Problem:
    init = ["--init-from", "none"] if scale == "paper" else []
    args = seqvcr.train.parse_args(["--scale", scale, *init, "--dropout", "0", "--batch", str(rows)])
    task = tasks.build_task(args.task, args.size)
    raw = task.draw(seeding.generator(0, "rows", 0), rows, CPU, True)
    tokens = upload(seqvcr.train.encode(args, task, raw).long(), device)
    model = seqvcr.train.build_model(args, task, device)

    def loss(precision: str) -> Tensor:
        return seqvcr.train.seqvcr_loss(
            model, tokens, n_targets=task.answer, lambda1=args.lambda1, lambda2=args.lambda2, layer=args.layer,
            axis=args.covariance_axis, covariance_batch=args.covariance_batch, precision=precision,
        )[0]  # fmt: skip

    return Problem(model, seqvcr.train.build_optimizer(args, model), loss, lambda: None)


PROBLEMS: dict[str, Callable[[str, int, torch.device], Problem]] = {
    "simsiam": simsiam_problem,
    "conmim": conmim_problem,
    "cocord": cocord_problem,
    "bsa": bsa_problem,
    "seqvcr": seqvcr_problem,
}
