"""Train the tokenizer: `accelerate launch -m train_tokenizer config=FILE option=value …`.

Stage 1 trains everything with a causal decoder; stage 2 keeps encoder and codebook of a stage-1
checkpoint and trains a bidirectional decoder. One command runs all phases of a stage, and the same
command goes on after an interruption.
"""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import configs.schema
from configs.schema import TokenizerRun
from data.images import CenterImages, TrainImages, list_images, to_float
from data.order import SampleOrder
from evaluation import in_training
from evaluation.reconstruction import codebook_use, reconstruct_all
from modeling.errors import InputError
from modeling.tokenizer import Tokenizer
from modeling.weights import load_tensors, write_state_dict
from train_tokenizer.discriminator import Discriminator, hinge_loss
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms
from training import checkpoint
from training.guard import FiniteGuard
from training.log import RunLog, Window, due
from training.randomness import seed_step
from training.runtime import run, start_training
from training.schedule import phase_at, tokenizer_lr

PREVIEWS, PER_ROW = 16, 8  # images in a preview, and pictures (before | after) in its row
STAGE1_ONLY = ("decoder.ffn_aux", "decoder.conv_out_aux", "quantize.embed_prob")
BUFFERS_AND_POSITIONS = ("decoder.class_embedding", "decoder.latent_token_positional_embedding")


def build_tokenizer(options: TokenizerRun) -> Tokenizer:
    """Stage 1: from scratch. Stage 2: encoder, codebook and, by default, decoder of stage 1."""
    tokenizer = Tokenizer(options.model.vq_model)
    if options.model.stage == 1:
        return tokenizer
    given = options.experiment.stage1_checkpoint
    if given is None:
        raise InputError(
            "stage 2 needs the tokenizer that stage 1 trained: give "
            "experiment.stage1_checkpoint=RUN_DIR or a weights file"
        )
    state = checkpoint.read_weights(given, "tokenizer")
    if options.model.decoder_init == "stage1":
        ignore, keep = STAGE1_ONLY + BUFFERS_AND_POSITIONS, BUFFERS_AND_POSITIONS
    else:
        ignore, keep = (*STAGE1_ONLY, "decoder."), ("decoder.",)
    load_tensors(tokenizer, state, given, ignore, keep)
    tokenizer.freeze_encoder()
    return tokenizer


def main(argv: list[str]) -> None:
    options = configs.schema.load(TokenizerRun, argv)
    experiment, training, phases = options.experiment, options.training, options.phases
    data, config = options.dataset.params, options.model.vq_model
    total_steps = sum(phase.steps for phase in phases)
    resize = data.resize or config.image_size
    if resize < config.image_size:
        raise InputError(f"dataset.params.resize={resize} is smaller than the image size")
    samples, _ = list_images(data.train_dir)
    paths = [path for path, _ in samples][: experiment.max_train_examples]
    held_out = [path for path, _ in list_images(data.val_dir)[0]] if data.val_dir else []
    run_dir = Path(experiment.output_dir)
    resume_from, warnings = checkpoint.choose(run_dir, experiment.resume)

    accelerator = start_training(training)
    device = accelerator.device
    evaluator = in_training.open_evaluator(
        experiment.fid_reference, bool(held_out), "dataset.params.val_dir"
    )
    tokenizer = build_tokenizer(options)
    adversarial = any(phase.gan_weight for phase in phases)
    discriminator = Discriminator() if adversarial else None
    networks = FrozenNetworks(phases, options.losses.pretrained, device)

    first_step = 1
    if resume_from is not None:
        state = checkpoint.load_state(resume_from)
        first_step = state["step"] + 1
        weights = checkpoint.load_weights_of(resume_from, "tokenizer")
        load_tensors(tokenizer, weights, str(resume_from))
        if adversarial:
            weights = checkpoint.load_weights_of(resume_from, "discriminator")
            load_tensors(discriminator, weights, str(resume_from))

    def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
        params = options.optimizer.params
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=0.0,  # set every step
            betas=(params.beta1, params.beta2),
            weight_decay=params.weight_decay,
            fused=True,
        )

    model, optimizer = accelerator.prepare(tokenizer, adamw(tokenizer))
    if adversarial:
        critic, critic_optimizer = accelerator.prepare(discriminator, adamw(discriminator))
    if resume_from is not None:
        optimizer.load_state_dict(state["optimizer"])
        if adversarial:
            critic_optimizer.load_state_dict(state["critic_optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])

    batch, world = training.per_gpu_batch_size, accelerator.num_processes
    accumulation = training.gradient_accumulation_steps
    order = SampleOrder(
        len(paths), batch, training.seed, accelerator.process_index, world,
        start=(first_step - 1) * accumulation,
    )  # fmt: skip
    loader = DataLoader(
        TrainImages(paths, config.image_size, resize, data.random_flip, training.seed),
        batch_sampler=order,
        num_workers=data.num_workers_per_gpu,
        pin_memory=device.type == "cuda",
    )
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        configs.schema.save(options, run_dir / "config.yaml")
    accelerator.wait_for_everyone()
    log = RunLog(accelerator, experiment, configs.schema.as_dict(options), first_step, total_steps)
    for warning in warnings:
        log.say(f"warning: {warning}")
    if (adversarial or networks.convnext or networks.lpips) and not options.losses.pretrained:
        log.say("warning: losses.pretrained=false, the perceptual networks are random (tests only)")
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in tokenizer.parameters()) - trained
    log.say(
        f"stage {options.model.stage}: {trained / 1e6:.1f}M parameters train, "
        f"{frozen / 1e6:.1f}M frozen; {len(paths)} images, {batch * world * accumulation} a step; "
        + ", ".join(f"{p.name} {p.steps}" for p in phases)
        + f" steps; from step {first_step} on {world} x {device.type}"
    )

    def save(step: int) -> None:
        if accelerator.is_main_process:
            weights = {"tokenizer": tokenizer.state_dict()}
            state = {"step": step, "optimizer": optimizer.state_dict()}
            if adversarial:
                weights["discriminator"] = discriminator.state_dict()
                state["critic_optimizer"] = critic_optimizer.state_dict()
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            checkpoint.save(run_dir, step, weights, state, experiment.keep_checkpoints)
        accelerator.wait_for_everyone()

    model.train()
    window, guard = Window(), FiniteGuard(device)
    code_counts = torch.zeros(config.codebook_size, device=device)
    batches = iter(loader)
    for step in range(first_step, total_steps + 1):
        phase, within = phase_at(phases, step)
        lr = tokenizer_lr(phases, step, options.optimizer.params.warmup_steps)
        seed_step(training.seed, accelerator.process_index, step)
        train_critic = bool(phase.gan_weight) and within % 2 == 0  # the first such step is ours
        latents = []
        for _ in range(accumulation):
            with window.waiting():
                images = to_float(next(batches).to(device, non_blocking=True))
            window.images += batch * world
            if train_critic:
                with torch.no_grad(), accelerator.autocast():
                    fake = tokenizer(images).images
                with accelerator.accumulate(critic):
                    real_logits, fake_logits = critic(torch.cat([images, fake])).chunk(2)
                    loss = hinge_loss(real_logits, fake_logits)
                    accelerator.backward(loss)
                values = {"critic": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}
                window.add(**values)
                continue
            with accelerator.accumulate(model):
                out = model(images)
                terms = tokenizer_terms(
                    out, images, config, options.model.stage, phase, options.losses, networks,
                    discriminator,
                )  # fmt: skip
                loss = sum(weight * value for weight, value in terms.values())
                accelerator.backward(loss)
            latents.append(out.latents.detach().flatten(0, 1))
            code_counts += torch.bincount(out.codes.flatten(), minlength=len(code_counts))
            values = {"loss": loss, **{name: value for name, (_, value) in terms.items()}}
            window.add(**values)

        active, active_optimizer = (
            (critic, critic_optimizer) if train_critic else (model, optimizer)
        )
        if config.clustering and not train_critic:
            # Between backward and step, as published: the optimizer then moves the moved codes.
            tokenizer.quantize.cluster(torch.cat(latents))
        # Clipping by infinity only measures.
        norm = accelerator.clip_grad_norm_(active.parameters(), training.max_grad_norm or math.inf)
        if accelerator.scaler is None:
            guard.watch(step, norm, values, active_optimizer.optimizer)
        for group in active_optimizer.param_groups:
            group["lr"] = lr
        active_optimizer.step()
        optimizer.zero_grad()
        if adversarial:
            critic_optimizer.zero_grad()  # the tokenizer's step leaves gradients there too
        log.bar.update()

        last = step == total_steps
        if last or due(step, experiment.log_every):
            guard.raise_if_bad(accelerator)
            values = window.close(accelerator)
            use, perplexity = codebook_use(accelerator.reduce(code_counts, "sum"))
            code_counts.zero_()
            log.metrics(step, {"lr": lr, **values, "codes used": use, "perplexity": perplexity})
        with window.paused():
            if held_out and (last or due(step, experiment.eval_every)):
                values, before, after = evaluate(accelerator, tokenizer, held_out, batch)
                log.metrics(step, {f"val/{k}": v for k, v in values.items()})
                log.images(step, "reconstruction", interleave(before, after), PER_ROW)
                if evaluator is not None:
                    workers = data.num_workers_per_gpu
                    values = in_training.reconstructed(
                        evaluator, tokenizer, held_out, batch, workers
                    )
                    log.metrics(step, values)
            if last or due(step, experiment.save_every):
                save(step)
    if accelerator.is_main_process:
        write_state_dict(tokenizer.state_dict(), run_dir / "tokenizer.pth")
    log.say(f"done; weights in {run_dir / 'tokenizer.pth'}")
    log.close()


def evaluate(
    accelerator: Accelerator, tokenizer: Tokenizer, paths: list[str], batch: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Reconstruction metrics on held-out images, shared by the ranks, and some before and after."""
    dataset = CenterImages(paths, tokenizer.config.image_size)
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    batches = DataLoader(Subset(dataset, list(mine)), batch_size=batch)
    with accelerator.autocast():
        sums, before, after = reconstruct_all(tokenizer, batches, accelerator.device)
    sums.values = accelerator.reduce(sums.values, "sum")
    return sums.metrics(), before[:PREVIEWS], after[:PREVIEWS]


def interleave(before: Tensor, after: Tensor) -> Tensor:
    """(N, …) and (N, …) -> (2N, …): before | after, pair by pair."""
    return torch.stack([before, after], 1).flatten(0, 1)


if __name__ == "__main__":
    run(main)
