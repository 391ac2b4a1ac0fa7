"""Train the generator on a token cache: `accelerate launch train_ar.py config=FILE option=value …`.

The same command goes on after an interruption.
"""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

import configs.schema
from configs.schema import GeneratorRun, OptimizerParams
from data.order import SampleOrder
from data.tokens import AllTokens, TokenStore, TrainTokens, fingerprint
from evaluation import in_training
from modeling.errors import InputError
from modeling.generator import Attention, Generator, SwiGLU, next_code_loss
from modeling.sampling import sample_codes
from modeling.tokenizer import Tokenizer
from modeling.weights import load_tensors, write_state_dict
from training import checkpoint
from training.guard import FiniteGuard
from training.log import RunLog, Window, due
from training.randomness import image_uniforms, seed_step
from training.runtime import run, start_training
from training.schedule import generator_lr

GRID_CLASSES, GRID_PER_CLASS = 10, 4  # of a sample grid


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


def open_cache(path: str, options: GeneratorRun, tokenizer: str | None) -> TokenStore:
    """A token cache that fits the configured models and, where it is known, the tokenizer."""
    store = TokenStore(path)
    model = options.model
    store.check(model.vq_model.codebook_size, model.vq_model.num_tokens, tokenizer)
    classes = model.generator.condition_num_classes
    if len(store.classes) > classes:
        raise InputError(
            f"{path} has {len(store.classes)} classes, more than "
            f"model.generator.condition_num_classes={classes}"
        )
    return store


def main(argv: list[str]) -> None:
    options = configs.schema.load(GeneratorRun, argv)
    experiment, training = options.experiment, options.training
    run_dir = Path(experiment.output_dir)
    resume_from, warnings = checkpoint.choose(run_dir, experiment.resume)
    tokenizer = fingerprint_now = None
    if experiment.generate_every:
        tokenizer = Tokenizer(options.model.vq_model)
        state = checkpoint.read_weights(experiment.tokenizer_checkpoint, "tokenizer")
        load_tensors(tokenizer, state, experiment.tokenizer_checkpoint)
        fingerprint_now = fingerprint(state)
    data = options.dataset.params
    store = open_cache(data.pretokenization, options, fingerprint_now)
    held_out = None
    if data.val_pretokenization is not None:
        held_out = open_cache(data.val_pretokenization, options, store.manifest["tokenizer"])

    accelerator = start_training(training)
    device = accelerator.device
    evaluator = in_training.open_evaluator(
        experiment.fid_reference, tokenizer is not None, "experiment.generate_every"
    )
    generator = Generator(options.model.generator)
    ema = None
    if training.use_ema:
        average = get_ema_multi_avg_fn(training.ema_decay)
        ema = AveragedModel(generator, device=device, multi_avg_fn=average)
    first_step, best = 1, float("inf")
    if resume_from is not None:
        state = checkpoint.load_state(resume_from)
        first_step, best = state["step"] + 1, state["best"]
        weights = checkpoint.load_weights_of(resume_from, "generator")
        load_tensors(generator, weights, str(resume_from))
        if ema is not None:
            load_tensors(
                ema.module, checkpoint.load_weights_of(resume_from, "ema"), str(resume_from)
            )
            ema.n_averaged.fill_(state["averaged"])
    trained = torch.compile(generator) if training.compile else generator
    model, optimizer = accelerator.prepare(trained, adamw(generator, options.optimizer.params))
    if resume_from is not None:
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    if tokenizer is not None:
        tokenizer.to(device).eval().requires_grad_(False)

    batch, world = training.per_gpu_batch_size, accelerator.num_processes
    accumulation = training.gradient_accumulation_steps
    images = min(store.images, experiment.max_train_examples or store.images)
    order = SampleOrder(
        images, batch, training.seed, accelerator.process_index, world,
        start=(first_step - 1) * accumulation,
    )  # fmt: skip
    dropout = options.model.generator.class_label_dropout
    loader = DataLoader(
        TrainTokens(store, training.seed, dropout, options.model.generator.no_class),
        batch_sampler=order,
        num_workers=data.num_workers_per_gpu,
        pin_memory=device.type == "cuda",
    )
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        configs.schema.save(options, run_dir / "config.yaml")
    accelerator.wait_for_everyone()
    total_steps, global_batch = training.max_train_steps, batch * world * accumulation
    log = RunLog(accelerator, experiment, configs.schema.as_dict(options), first_step, total_steps)
    for warning in warnings:
        log.say(f"warning: {warning}")
    log.say(
        f"{sum(p.numel() for p in generator.parameters()) / 1e6:.1f}M parameters; {images} images x "
        f"{store.views} views; {global_batch} a step, {total_steps} steps = "
        f"{total_steps * global_batch / images:.1f} epochs, "
        f"{total_steps * global_batch * store.tokens / 1e9:.2f}G codes; from step {first_step} on "
        f"{world} x {device.type}"
    )

    def save(step: int) -> None:
        if accelerator.is_main_process:
            weights = {"generator": generator.state_dict()}
            state = {"step": step, "best": best, "optimizer": optimizer.state_dict()}
            if ema is not None:
                weights["ema"] = ema.module.state_dict()
                state["averaged"] = ema.n_averaged.item()
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            checkpoint.save(run_dir, step, weights, state, experiment.keep_checkpoints)
        accelerator.wait_for_everyone()

    model.train()
    window, guard = Window(), FiniteGuard(device)
    batches = iter(loader)
    for step in range(first_step, total_steps + 1):
        lr = generator_lr(step, total_steps, options.lr_scheduler)
        seed_step(training.seed, accelerator.process_index, step)
        for _ in range(accumulation):
            with window.waiting():
                codes, labels = (x.to(device, non_blocking=True) for x in next(batches))
            with accelerator.accumulate(model):
                logits = model(codes[:, :-1], labels)
                loss, accuracy = next_code_loss(logits, codes)
                accelerator.backward(loss)
            window.add(loss=loss, accuracy=accuracy)
        window.images += global_batch
        # Clipping by infinity only measures.
        norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
        if due(step, experiment.log_grad_norm_every):
            window.add(grad_norm=norm)
        if accelerator.scaler is None:
            guard.watch(step, norm, {"loss": loss}, optimizer.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(generator)
        log.bar.update()

        last = step == total_steps
        if last or due(step, experiment.log_every):
            guard.raise_if_bad(accelerator)
            values = window.close(accelerator)
            log.metrics(step, {"lr": lr, **values})
        with window.paused():
            shown = ema.module if ema is not None else generator  # what is evaluated and sampled
            if held_out is not None and (last or due(step, experiment.eval_every)):
                values = evaluate(accelerator, shown, held_out, batch)
                log.metrics(step, {f"val/{k}": v for k, v in values.items()})
                if values["loss"] < best:
                    best = values["loss"]
                    if accelerator.is_main_process:
                        write_state_dict(shown.state_dict(), run_dir / "generator_best.bin")
            if tokenizer is not None and (last or due(step, experiment.generate_every)):
                grid = sample_grid(accelerator, shown, tokenizer, options)
                log.images(step, "samples", grid, GRID_CLASSES)
                if evaluator is not None:
                    log.metrics(step, in_training.generated(evaluator, shown, tokenizer, options))
            if last or due(step, experiment.save_every):
                save(step)
    if accelerator.is_main_process:
        write_state_dict(generator.state_dict(), run_dir / "generator.bin")
        if ema is not None:
            write_state_dict(ema.module.state_dict(), run_dir / "generator_ema.bin")
    log.say(f"done; weights in {run_dir / 'generator.bin'}")
    log.close()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, store: TokenStore, batch: int
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
    accelerator: Accelerator, model: nn.Module, tokenizer: Tokenizer, options: GeneratorRun
) -> Tensor:
    """Images in [0, 1], a row of different classes after another; only on the main process."""
    if not accelerator.is_main_process:
        return torch.empty(0)
    generator = options.model.generator
    classes = torch.linspace(0, generator.condition_num_classes - 1, GRID_CLASSES).long()
    labels = classes.repeat(GRID_PER_CLASS).to(accelerator.device)
    uniforms = image_uniforms(generator.seed, range(len(labels)), generator.image_seq_len)
    was_training = model.training
    model.eval()
    codes = sample_codes(
        model,
        labels,
        uniforms.to(accelerator.device),
        generator.guidance_scale,
        generator.guidance_scale_pow,
        generator.randomize_temperature,
    )
    images = tokenizer.decode(codes)
    model.train(was_training)
    return images


if __name__ == "__main__":
    run(main)
