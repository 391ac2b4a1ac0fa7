"""Train the tokenizer: `accelerate launch -m train_tokenizer config=FILE option=value …`.

Stage 1 trains everything with a causal decoder; stage 2 keeps encoder and codebook of a stage-1
checkpoint and trains a bidirectional decoder. One command runs all phases of a stage, and the same
command goes on after an interruption.
"""

import itertools
import math
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import configs.load
from configs.schema import Phase, TokenizerRun
from data.images import TrainImages, list_paths, to_float
from data.loader import training_loader
from evaluation import in_training
from evaluation.lpips import LPIPS, lpips_is_available
from evaluation.reconstruction import Preview, codebook_use, image_batches, reconstruct
from modeling.tokenizer import Tokenizer
from modeling.weights import describe, load_tensors, read_state_dict, write_state_dict
from runtime.errors import InputError
from runtime.processes import compiles, on_main
from runtime.program import run
from runtime.randomness import seed_step
from runtime.signals import SAVED_AND_STOPPED, StopSignal
from train_tokenizer.discriminator import Discriminator, hinge_loss
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms
from training import checkpoint
from training.accelerator import start_training
from training.log import RunLog, Window, due
from training.optim import FiniteGuard
from training.resume import flatten
from training.run import RunFolder
from training.schedule import phase_at, tokenizer_lr

PREVIEWS, PER_ROW = 16, 8  # images in a preview, and pictures (before | after) in its row
STAGE1_ONLY = ("decoder.ffn_aux", "decoder.conv_out_aux", "quantize.embed_prob")
BUFFERS_AND_POSITIONS = ("decoder.class_embedding", "decoder.latent_token_positional_embedding")
# In a checkpoint, "tokenizer" is what the run has to show: with EMA the average. These are then
# the weights that training goes on from.
UNAVERAGED = "unaveraged"
# What a run may change when it goes on: nothing here moves its weights, but for rounding. Of the
# phases, those that have begun are compared.
FREE_TO_CHANGE = (
    "experiment.", "dataset.params.train_dir", "dataset.params.val_dir",
    "dataset.params.num_workers_per_gpu", "model.use_checkpoint",
    "training.gradient_accumulation_steps", "training.per_gpu_batch_size", "training.enable_",
    "training.compile", "training.timeout_minutes", "training.max_train_steps",
)  # fmt: skip
COLLAPSED = 0.1  # less of the codebook in use than this is worth a warning …
MEANT = 10  # … once a window has so many tokens a code that chance does not explain it


def build_tokenizer(options: TokenizerRun) -> Tokenizer:
    """Stage 1: from scratch. Stage 2: encoder, codebook and, by default, decoder of stage 1."""
    tokenizer = Tokenizer(options.model.vq_model)
    tokenizer.encoder.recompute = tokenizer.decoder.recompute = options.model.use_checkpoint
    if options.model.stage == 1:
        # Without its loss no gradient reaches the codebook, for which DDP would wait.
        tokenizer.quantize.requires_grad_(options.losses.quantizer_weight > 0)
        return tokenizer
    given = options.experiment.stage1_checkpoint
    if given is None:
        raise InputError(
            "stage 2 needs the tokenizer that stage 1 trained: give "
            "experiment.stage1_checkpoint=RUN_DIR or a weights file"
        )
    state = read_state_dict(on_main(lambda: checkpoint.weights_file(given, "tokenizer")))
    if options.model.decoder_init == "stage1":
        ignore, keep = STAGE1_ONLY + BUFFERS_AND_POSITIONS, BUFFERS_AND_POSITIONS
    else:
        ignore, keep = (*STAGE1_ONLY, "decoder."), ("decoder.",)
    load_tensors(tokenizer, state, given, ignore, keep)
    if options.model.decoder_init == "stage1" and not any(k.startswith(STAGE1_ONLY) for k in state):
        raise InputError(
            f"{given} is no checkpoint of stage 1 but {describe(state)}: give stage 1's run, or "
            f"model.decoder_init=scratch to take only encoder and codebook from it"
        )
    tokenizer.freeze_encoder()
    return tokenizer


def main(argv: list[str]) -> None:
    options = configs.load.load(TokenizerRun, argv, "train_tokenizer")
    experiment, training, phases = options.experiment, options.training, options.phases
    data, config = options.dataset.params, options.model.vq_model
    total_steps = sum(phase.steps for phase in phases)
    resize = data.resize or config.image_size
    if resize < config.image_size:
        raise InputError(f"dataset.params.resize={resize} is smaller than the image size")
    paths = list_paths(data.train_dir)[: experiment.max_train_examples]
    held_out = list_paths(data.val_dir) if data.val_dir else []

    accelerator = start_training(training)
    device, world = accelerator.device, accelerator.num_processes
    stop = StopSignal(timedelta(minutes=training.timeout_minutes))
    folder = RunFolder(accelerator, experiment)
    batch, accumulation = training.per_gpu_batch_size, training.gradient_accumulation_steps
    global_batch = batch * world * accumulation

    def this_run(step: int) -> dict:
        """What the run was until `step`, to compare with when it goes on."""
        so_far = {**configs.load.as_dict(options), "phases": begun(phases, step)}
        return {**flatten(so_far), "images": len(paths), "batch in all": global_batch}

    evaluator = in_training.open_evaluator(
        experiment.fid_reference, bool(held_out), "dataset.params.val_dir", Path("weights"),
        config.image_size,
    )  # fmt: skip
    set_seed(training.seed)  # the same initial weights on every rank, whatever was built before
    tokenizer = build_tokenizer(options)
    adversarial = any(phase.gan_weight for phase in phases)
    discriminator = Discriminator() if adversarial else None
    pretrained = options.perceptual.pretrained
    weights = Path("weights")
    with accelerator.local_main_process_first():  # one rank reads the disk, the others its cache
        networks = FrozenNetworks(phases, weights if pretrained else None, device)
        lpips = networks.lpips if pretrained else None  # what evaluation measures with
        if lpips is None and pretrained and held_out and lpips_is_available(weights):
            lpips = LPIPS(weights).to(device)
    ema = None
    if training.use_ema:
        average = get_ema_multi_avg_fn(training.ema_decay)
        ema = AveragedModel(tokenizer, device=device, multi_avg_fn=average)

    first_step, source = folder.first_step, str(folder.source)
    if folder.source is not None:
        state = folder.state(this_run(first_step - 1), FREE_TO_CHANGE)
        load_tensors(tokenizer, folder.weights(UNAVERAGED, "tokenizer"), source)
        if ema is not None and "averaged" in state:  # else the average begins here
            load_tensors(ema.module, folder.weights("tokenizer"), source)
            ema.n_averaged.fill_(state["averaged"])
        if adversarial and "critic_optimizer" in state:  # not after phases without one
            load_tensors(discriminator, folder.weights("discriminator"), source)

    def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
        params = options.optimizer.params
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=0.0,  # set every step
            betas=(params.beta1, params.beta2),
            weight_decay=params.weight_decay,
            fused=True,
        )

    compile_it = compiles(training.compile, "training.compile")
    compiled = torch.compile(tokenizer) if compile_it else tokenizer
    model, optimizer = accelerator.prepare(compiled, adamw(tokenizer))
    if adversarial:
        critic, critic_optimizer = accelerator.prepare(discriminator, adamw(discriminator))
    if folder.source is not None:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError as e:  # possible for a checkpoint that was given by name
            raise InputError(f"{source} is of a run that trained other parameters: {e}") from e
        if adversarial and "critic_optimizer" in state:
            critic_optimizer.load_state_dict(state["critic_optimizer"])

    draws = TrainImages(paths, config.image_size, resize, data.random_flip, training.seed)
    workers = data.num_workers_per_gpu
    loader = training_loader(draws, len(paths), training, workers, accelerator, first_step)
    folder.open(options)
    log = RunLog(accelerator, experiment, configs.load.as_dict(options), first_step, total_steps)
    for warning in folder.warnings:
        log.say(f"warning: {warning}")
    if (networks.convnext or networks.lpips) and not pretrained:
        log.say("warning: perceptual.pretrained=false: the networks are random, for tests only")
    if held_out and lpips is None:
        log.say("no val/lpips: it needs VGG16 and its heads (weights/README.md)")
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in tokenizer.parameters()) - trained
    log.say(
        f"stage {options.model.stage}: {trained / 1e6:.1f}M parameters train, "
        f"{frozen / 1e6:.1f}M frozen; {len(paths)} images, {global_batch} a step; "
        + " + ".join(f"{p.name} {p.steps}" for p in phases)
        + f" = {total_steps} steps = {total_steps * global_batch / len(paths):.1f} epochs; from step {first_step} on {world} x {device.type}"
    )

    shown = tokenizer if ema is None else ema.module  # what is evaluated, previewed and exported

    def save(step: int) -> None:
        weights = {"tokenizer": shown.state_dict()}
        state = {"run": this_run(step), "optimizer": optimizer.state_dict()}
        if ema is not None:
            weights[UNAVERAGED] = tokenizer.state_dict()
            state["averaged"] = ema.n_averaged.item()
        if adversarial:
            weights["discriminator"] = discriminator.state_dict()
            state["critic_optimizer"] = critic_optimizer.state_dict()
        state["window"] = window.state(accelerator)
        state["code_counts"] = accelerator.reduce(code_counts, "sum").cpu()  # of the window
        folder.save(step, weights, state)

    model.train()
    window, guard = Window(), FiniteGuard(device)
    code_counts = torch.zeros(config.codebook_size, device=device)
    if folder.source is not None:
        window.restore(state["window"], accelerator)
        if accelerator.is_main_process:
            code_counts += state["code_counts"].to(device)
        del state  # gigabytes of moments, in host memory
    collapse_said = False
    # Compiling and the first choices of kernels are over after one step: time counts from there.
    began, timed = time.perf_counter(), False
    batches = iter(loader)
    for step in range(first_step, total_steps + 1):
        phase, within = phase_at(phases, step)
        number = 1 + [id(p) for p in phases].index(id(phase))  # two phases may be equal
        lr = tokenizer_lr(phases, step, options.optimizer.params.warmup_steps)
        seed_step(training.seed, accelerator.process_index, step)
        train_critic = bool(phase.gan_weight) and within % 2 == 0  # the first such step is ours
        if within == 1 or step == first_step:
            log.say(f"phase {phase.name}: step {within} of {phase.steps}")
        latents, watched = [], {}
        for _ in range(accumulation):
            with window.waiting():
                images = to_float(next(batches).to(device, non_blocking=True))
            window.images += batch * world
            if train_critic:
                with torch.no_grad(), accelerator.autocast():
                    fake = compiled(images).images
                with accelerator.accumulate(critic):
                    real_logits, fake_logits = critic(torch.cat([images, fake])).chunk(2)
                    loss = hinge_loss(real_logits, fake_logits)
                    accelerator.backward(loss)
                values = {"critic": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}
                window.add(**values)
                add_up(watched, values)
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
            codes = out.codes.flatten()
            code_counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=code_counts.dtype))
            values = {"loss": loss, **{name: value for name, (_, value) in terms.items()}}
            window.add(**values)
            add_up(watched, values)

        active, active_optimizer = (
            (critic, critic_optimizer) if train_critic else (model, optimizer)
        )
        if config.clustering and not train_critic:
            # Between backward and step, as published: the optimizer then moves the moved codes.
            tokenizer.quantize.cluster(torch.cat(latents))
        # Clipping by infinity only measures.
        norm = accelerator.clip_grad_norm_(active.parameters(), training.max_grad_norm or math.inf)
        if due(step, experiment.log_grad_norm_every):
            window.add(grad_norm=norm)
        if accelerator.scaler is not None:
            # Loss scaling meets infinite gradients by design; the losses have to be finite.
            norm = accelerator.reduce(watched["critic" if train_critic else "loss"], "sum")
        guard.watch(step, norm, watched, active_optimizer.optimizer)
        for group in active_optimizer.param_groups:
            group["lr"] = lr
        active_optimizer.step()
        optimizer.zero_grad()
        if adversarial:
            critic_optimizer.zero_grad()  # the tokenizer's step leaves gradients there too
        if ema is not None and not train_critic:
            ema.update_parameters(tokenizer)
        log.bar.update()

        last, stops = step == total_steps, stop.agreed()
        logs, evaluates, previews, saves = (
            last or due(step, every)
            for every in (
                experiment.log_every, experiment.eval_every, experiment.generate_every,
                experiment.save_every,
            )
        )  # fmt: skip
        saves = saves or stops
        if logs or evaluates or previews or saves:
            guard.raise_if_bad(accelerator)
        if logs:
            values = {"lr": lr, "phase": number, **window.close(accelerator)}
            counts = accelerator.reduce(code_counts, "sum")
            code_counts.zero_()
            if counts.any():  # else all steps were the discriminator's
                values["codes used"], values["perplexity"] = codebook_use(counts)
                if not collapse_said and has_collapsed(counts):
                    collapse_said = True
                    log.say(
                        f"warning: the codebook has collapsed: {values['codes used']:.2%} of "
                        f"{len(counts)} codes are used, perplexity {values['perplexity']:.1f}; "
                        f"lower the learning rate, or train stage 1 with clustering"
                    )
            log.metrics(step, values)
            if not timed and step > first_step:
                seconds = (time.perf_counter() - began) / (step - first_step)
                log.say(
                    f"expected time: {(total_steps - step) * seconds / 3600:.2f} hours for the "
                    f"{total_steps - step} steps left, at this phase's {seconds:.3g} s a step"
                )
                timed = True
        with window.paused():
            if held_out and evaluates:
                values = in_training.reconstructed(
                    shown, held_out, batch, workers, PartialState(), lpips, evaluator
                )
                log.metrics(step, values)
            if previews:
                log.images(step, "reconstruction", preview(shown, held_out or paths), PER_ROW)
            if saves:
                save(step)
        if stops and not last:
            log.say(f"asked to stop: saved step {step}; the same command goes on")
            log.close()
            raise SystemExit(SAVED_AND_STOPPED)
        if step == first_step:
            began = time.perf_counter()
    if accelerator.is_main_process:
        write_state_dict(shown.state_dict(), folder.path / "tokenizer.pth")
    log.say(f"done; weights in {folder.path / 'tokenizer.pth'}")
    log.close()


def begun(phases: list[Phase], step: int) -> list[dict]:
    """The phases with a step up to `step`: what a run has been so far."""
    starts = itertools.accumulate((phase.steps for phase in phases), initial=0)
    return [configs.load.as_dict(p) for p, start in zip(phases, starts) if start < step]


def add_up(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add the detached values of one micro-batch, in place; what is not finite stays so."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach()


def has_collapsed(counts: Tensor) -> bool:
    """Whether so few codes occur in counts (codebook_size,) that it is no accident."""
    use, _ = codebook_use(counts)
    return use < COLLAPSED and counts.sum().item() >= MEANT * len(counts)


def preview(tokenizer: Tokenizer, paths: list[str]) -> Tensor:
    """Before | after of some images from all over the list; none except on the main process."""
    processes, pictures = PartialState(), Preview(PREVIEWS)
    if processes.is_main_process:
        chosen = torch.linspace(0, len(paths) - 1, min(PREVIEWS, len(paths))).long().tolist()
        size = tokenizer.config.image_size
        batches = image_batches([paths[i] for i in chosen], size, PREVIEWS, workers=0)
        reconstruct(tokenizer, batches, processes.device, [pictures])
    return pictures.pairs()


if __name__ == "__main__":
    run(main)
