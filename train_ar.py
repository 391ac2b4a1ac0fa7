"""Train the generator on a token cache: `accelerate launch train_ar.py config=FILE option=value …`.

The same command goes on after an interruption.
"""

import copy
import math
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

import configs.load
from configs.schema import GeneratorRun, OptimizerParams
from data.images import VIEWS, TrainViews, list_images, to_float
from data.loader import training_loader
from data.tokens import AllTokens, TokenCache, TrainTokens, fingerprint, open_tokens
from evaluation import in_training
from modeling.generator import Attention, Generator, SwiGLU, next_code_loss
from modeling.tokenizer import Tokenizer
from modeling.weights import load_tensors, read_state_dict, write_state_dict
from runtime.errors import InputError
from runtime.processes import compiles, device_name, on_main
from runtime.program import run
from runtime.randomness import image_uniforms, seed_step
from runtime.signals import SAVED_AND_STOPPED, StopSignal
from training import checkpoint
from training.accelerator import precision, start_training
from training.log import RunLog, Window, due
from training.optim import FiniteGuard
from training.resume import flatten
from training.run import RunFolder
from training.schedule import generator_lr
from training.utilisation import peak_flops, training_flops

GRID_CLASSES, GRID_PER_CLASS = 10, 4  # of a sample grid
# What a run may change when it goes on: nothing here moves its weights, but for rounding. The
# data, the batch in all and the tokenizer are compared for themselves, wherever they come from.
FREE_TO_CHANGE = (
    "experiment.", "dataset.", "model.vq_model.", "model.generator.randomize_temperature",
    "model.generator.guidance_", "model.generator.top_", "model.generator.seed",
    "model.generator.use_checkpoint",
    "training.gradient_accumulation_steps", "training.per_gpu_batch_size", "training.enable_",
    "training.compile", "training.timeout_minutes",
)  # fmt: skip
# Whole tensors under the model's own names, however DDP, FSDP or torch.compile wrap it; so a run
# goes on under another launcher and on another number of processes.
WHOLE = StateDictOptions(full_state_dict=True)
WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)  # {} on other ranks


def parameter_groups(model: Generator, weight_decay: float) -> list[dict]:
    """Weight decay on the matrices of attention, MLP and output only, by module, not by name."""
    decayed = [model.output.weight]
    for module in model.modules():
        if isinstance(module, Attention):
            decayed += [module.qkv.weight, module.proj.weight]
        if isinstance(module, SwiGLU):
            decayed += [module.w1.weight, module.w2.weight, module.w3.weight]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def adamw(model: Generator, params: OptimizerParams) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, params.weight_decay),
        lr=0.0,  # set every step
        betas=(params.beta1, params.beta2),
        fused=True,
    )


def open_cache(path: str, options: GeneratorRun, tokenizer: str | None) -> TokenCache:
    """A token cache that fits the configured models and, where it is known, the tokenizer."""
    store = open_tokens(path)
    model = options.model
    store.check(model.vq_model.codebook_size, model.vq_model.num_tokens, tokenizer)
    check_classes(path, store.classes, options)
    return store


def check_classes(path: str, classes: list[str], options: GeneratorRun) -> None:
    known = options.model.generator.condition_num_classes
    if len(classes) > known:
        raise InputError(
            f"{path} has {len(classes)} classes, more than "
            f"model.generator.condition_num_classes={known}"
        )


def export(state: dict[str, Tensor], path: Path) -> None:
    """Weights as PATH.bin, the published format, and PATH.safetensors."""
    for suffix in (".bin", ".safetensors"):
        write_state_dict(state, path.with_suffix(suffix))


def main(argv: list[str]) -> None:
    options = configs.load.load(GeneratorRun, argv, "train_ar")
    experiment, training = options.experiment, options.training
    data, config = options.dataset.params, options.model.generator
    accelerator = start_training(training)
    compiled = compiles(training.compile, "training.compile")
    tokenizer = fingerprint_now = None
    if experiment.generate_every or data.train_dir is not None:
        tokenizer = Tokenizer(options.model.vq_model)
        given = experiment.tokenizer_checkpoint
        state = read_state_dict(on_main(lambda: checkpoint.weights_file(given, "tokenizer")))
        load_tensors(tokenizer, state, given)
        fingerprint_now = fingerprint(state)
    if data.train_dir is None:
        store = open_cache(data.pretokenization, options, fingerprint_now)
        images, views, fingerprint_now = store.images, store.views, store.manifest["tokenizer"]
        draws = TrainTokens(store, training.seed, config.class_label_dropout, config.no_class)
    else:
        samples, classes = list_images(data.train_dir)
        check_classes(data.train_dir, classes, options)
        images, views, size = len(samples), VIEWS["ten_crop"], options.model.vq_model.image_size
        draws = TrainViews(
            samples, size, training.seed, config.class_label_dropout, config.no_class
        )
    images = min(images, experiment.max_train_examples or images)
    held_out = None
    if data.val_pretokenization is not None:
        held_out = open_cache(data.val_pretokenization, options, fingerprint_now)

    device, world = accelerator.device, accelerator.num_processes
    stop = StopSignal(timedelta(minutes=training.timeout_minutes))
    folder = RunFolder(accelerator, experiment)
    batch, accumulation = training.per_gpu_batch_size, training.gradient_accumulation_steps
    total_steps, global_batch = training.max_train_steps, batch * world * accumulation
    this_run = {
        **flatten(configs.load.as_dict(options)),
        "images": images,
        "views": views,
        "batch in all": global_batch,
        "tokenizer": fingerprint_now,
    }
    evaluator = in_training.open_evaluator(
        experiment.fid_reference, bool(experiment.generate_every), "experiment.generate_every",
        Path("weights"), options.model.vq_model.image_size,
    )  # fmt: skip
    if experiment.generate_every:
        in_training.job_in_training(options, device)  # refused now, not at the first samples
    set_seed(training.seed)  # the same initial weights on every rank, whatever was built before
    generator = Generator(config)
    ema = copy.deepcopy(generator).requires_grad_(False) if training.use_ema else None
    average = get_ema_multi_avg_fn(training.ema_decay)
    first_step, best = folder.first_step, float("inf")
    if folder.source is not None:
        state = folder.state(this_run, FREE_TO_CHANGE)
        best = state.get("best", best)
        load_tensors(generator, folder.weights("generator"), str(folder.source))
        if ema is not None:  # without one there, the average begins here
            load_tensors(ema, folder.weights("ema", "generator"), str(folder.source))
    model, optimizer = accelerator.prepare(generator, adamw(generator, options.optimizer.params))
    if ema is not None:
        ema = fsdp2_prepare_model(accelerator, ema) if accelerator.is_fsdp2 else ema.to(device)
    loss_of = next_code_loss
    if compiled:
        generator.compile()
        loss_of = torch.compile(next_code_loss)  # one pass over the logits
    if folder.source is not None:
        set_optimizer_state_dict(
            generator, optimizer.optimizer, optim_state_dict=state["optimizer"], options=WHOLE
        )
    if tokenizer is not None:
        tokenizer.to(device).eval().requires_grad_(False)

    workers = data.num_workers_per_gpu
    loader = training_loader(draws, images, training, workers, accelerator, first_step)
    folder.open(options)
    log = RunLog(accelerator, experiment, configs.load.as_dict(options), first_step, total_steps)
    for warning in folder.warnings:
        log.say(f"warning: {warning}")
    parameters = sum(p.numel() for p in generator.parameters())
    epochs = total_steps * global_batch / images
    log.say(
        f"{parameters / 1e6:.1f}M parameters on {world} x {device_name(device)}, "
        f"{precision(training)}{', compiled' * compiled}"
    )
    log.say(
        f"{images} images x {views} views; {global_batch} images a step = {batch} x {world} ranks "
        f"x {accumulation}; steps {first_step} to {total_steps}, {epochs:.1f} epochs of the images "
        f"or {epochs / views:.1f} of all views, "
        f"{total_steps * global_batch * config.image_seq_len / 1e9:.3g}G codes"
    )

    def save(step: int) -> None:
        weights = {"generator": get_model_state_dict(generator, options=WHOLE_ON_MAIN)}
        if ema is not None:
            weights["ema"] = get_model_state_dict(ema, options=WHOLE_ON_MAIN)
        optimizer_state = get_optimizer_state_dict(
            generator, optimizer.optimizer, options=WHOLE_ON_MAIN
        )
        state = {"best": best, "run": this_run, "optimizer": optimizer_state}
        folder.save(step, weights, {**state, "window": window.state(accelerator)})

    def shown() -> Generator:
        """What is evaluated, sampled and exported as the best: the average where there is one."""
        part = generator if ema is None else ema
        if not accelerator.is_fsdp2:
            return part
        whole = Generator(config).to(device)  # a rank alone cannot run what FSDP has cut
        whole.load_state_dict(get_model_state_dict(part, options=WHOLE))
        return whole

    model.train()
    window, guard = Window(), FiniteGuard(device)
    if folder.source is not None:
        window.restore(state.get("window", {}), accelerator)
        del state  # gigabytes of moments, in host memory
    flops, peak = training_flops(config), peak_flops(device, precision(training))
    batches, told = iter(loader), False
    for step in range(first_step, total_steps + 1):
        lr = generator_lr(step, total_steps, options.lr_scheduler)
        seed_step(training.seed, accelerator.process_index, step)
        for _ in range(accumulation):
            with window.waiting():
                codes, labels = (x.to(device, non_blocking=True) for x in next(batches))
            if data.train_dir is not None:
                codes = tokenizer.encode(to_float(codes))  # they came as images
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss, accuracy = loss_of(model(codes[:, :-1], labels), codes)
                accelerator.backward(loss)
            window.add(loss=loss, accuracy=accuracy)
        window.images += global_batch
        # Clipping by infinity only measures.
        norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # FSDP: each rank holds a share
        if due(step, experiment.log_grad_norm_every):
            window.add(grad_norm=norm)
        if accelerator.scaler is None:
            guard.watch(step, norm, {"loss": loss}, optimizer.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            average(list(ema.parameters()), list(generator.parameters()), None)
        log.bar.update()

        last, stops = step == total_steps, stop.agreed()
        logs = last or due(step, experiment.log_every)
        evaluates = held_out is not None and (last or due(step, experiment.eval_every))
        generates = experiment.generate_every and (last or due(step, experiment.generate_every))
        saves = last or stops or due(step, experiment.save_every)
        if not (logs or evaluates or generates or saves):
            continue
        guard.raise_if_bad(accelerator)  # the first host sync of this step
        if logs:
            values = window.close(accelerator)
            rate = values["images/s"]
            values["images/s per device"] = rate / world
            if peak is not None:
                values["mfu"] = rate / world * flops / peak
            values["hours left"] = (total_steps - step) * global_batch / rate / 3600
            if not told:
                hours = total_steps * global_batch / rate / 3600
                log.say(f"expected time: {hours:.3g} h, less if the first steps were slow")
                told = True
            log.metrics(step, {"lr": lr, **values})
        # Eager: odd batch sizes are not worth compiling for.
        with window.paused(), torch.compiler.set_stance("force_eager"):
            if evaluates or generates:
                model_shown = shown()
            if evaluates:
                values = evaluate(accelerator, model_shown, held_out, batch)
                log.metrics(step, {f"val/{k}": v for k, v in values.items()})
                if values["loss"] < best:
                    best = values["loss"]
                    if accelerator.is_main_process:
                        export(model_shown.state_dict(), folder.path / "generator_best")
            if generates:
                grid = sample_grid(accelerator, model_shown, tokenizer, options)
                log.images(step, "samples", grid, GRID_CLASSES)
            if generates and evaluator is not None:
                values = in_training.generated(evaluator, model_shown, tokenizer, options)
                log.metrics(step, values)
            if saves:
                save(step)
        if stops and not last:
            log.say(f"asked to stop: saved step {step}; the same command goes on")
            log.close()
            raise SystemExit(SAVED_AND_STOPPED)
    for name, part in (("generator", generator), ("generator_ema", ema)):
        if part is not None:
            state = get_model_state_dict(part, options=WHOLE_ON_MAIN)
            if accelerator.is_main_process:
                export(state, folder.path / name)
    log.say(f"done; weights in {folder.path / 'generator.bin'} and .safetensors")
    log.close()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, store: TokenCache, batch: int
) -> dict[str, float]:
    """Loss (nats a code) and top-1 accuracy over every view of a held-out cache."""
    dataset = AllTokens(store)
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for codes, labels in DataLoader(Subset(dataset, list(mine)), batch_size=batch):
        codes, labels = codes.to(accelerator.device), labels.to(accelerator.device)
        with accelerator.autocast():
            loss, accuracy = next_code_loss(model(codes[:, :-1], labels), codes)
        sums += torch.stack([loss * len(codes), accuracy * len(codes), loss.new_tensor(len(codes))])
    model.train(was_training)
    loss, accuracy, count = accelerator.reduce(sums, "sum").tolist()
    return {"loss": loss / count, "accuracy": accuracy / count}


@torch.no_grad()
def sample_grid(
    accelerator: Accelerator, model: Generator, tokenizer: Tokenizer, options: GeneratorRun
) -> Tensor:
    """Images in [0, 1], a row of different classes after another; only on the main process."""
    if not accelerator.is_main_process:
        return torch.empty(0)
    generator = options.model.generator
    classes = torch.linspace(0, generator.condition_num_classes - 1, GRID_CLASSES).long()
    labels = classes.repeat(GRID_PER_CLASS)
    uniforms = image_uniforms(generator.seed, range(len(labels)), generator.image_seq_len)
    engine = in_training.sampling_engine(model, options, len(labels))
    return tokenizer.decode(engine.sample(labels, uniforms))


if __name__ == "__main__":
    run(main)
