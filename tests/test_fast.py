"""Fast modes: each against its slow twin, values and gradients; the compiled step against the eager one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fasthpm import loss, recipes
from fasthpm.errors import UserError
from fasthpm.exchange.forms import HuggingFaceMAE
from fasthpm.layers import CrossBlock
from fasthpm.mask import random_mask, split_ids
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.speed import flops, fp8
from fasthpm.speed.compiled import Compiled
from tests.helpers import reference
from tests.helpers.launch import run_ranks
from tests.helpers.steps import ALPHA, NoSynchronisation, batch, step_of

MODES: dict[str, dict[str, Any]] = {
    "shared": {"predictor": "shared"},
    "cross": {"decoder_attention": "cross"},
    "both": {"predictor": "shared", "decoder_attention": "cross"},
    "shallow": {"decoder_depth": 2, "predictor_depth": 1},
    "scale": {"input_size": "32", "teacher_scale": 2},
}


def doubled(**changes: Any) -> HPMViT:
    """The debug recipe's model in float64, with biases and norms that matter."""
    model = model_of(dataclasses.replace(recipes.debug(), **changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


def gradients(value: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-8, atol=1e-10, msg=f"gradient of {name}")


# ------------------------------------------------------------------------------------------------------ the model
def test_a_cross_block_is_its_equations() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 4.0).double()
    tokens, context = (torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    fast, slow = block(tokens, context)[0], reference.cross_block(tokens[0], context[0], block)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    given = [tokens, context, *block.parameters()]
    ours = torch.autograd.grad((fast * weight).sum(), given)
    theirs = torch.autograd.grad((slow * weight).sum(), given)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("mode", ["cross", "both"])
def test_cross_attention_decoders_are_self_attention_that_sees_the_context_alone(mode: str) -> None:
    """A whole forward: blocks of plain attention on all tokens, of which only mask tokens change."""
    model = doubled(decoder_depth=2, **MODES[mode])
    images, mask = torch.randn(2, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(2, 49), 0.75)
    fast = model(images, mask)

    def slow_run(blocks: Any, tokens: Tensor, last: int) -> Tensor:
        context, asking = tokens[:, :-last], tokens[:, -last:]
        for block in blocks:
            asking = torch.stack([reference_block(block, a, c) for a, c in zip(asking, context, strict=True)])
        return asking

    def reference_block(block: Any, asking: Tensor, context: Tensor) -> Tensor:
        everything = block.norm1(torch.cat([context, asking]))
        query, key, value = F.linear(everything, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=1)
        hidden = torch.ones(len(everything), len(everything), dtype=torch.bool)
        hidden[:, : len(context)] = False
        out = []
        for head in range(block.attn.num_heads):
            size = query.shape[1] // block.attn.num_heads
            part = slice(head * size, (head + 1) * size)
            scores = (query[:, part] @ key[:, part].T / size**0.5).masked_fill(hidden, -torch.inf)
            out.append(scores.softmax(dim=1) @ value[:, part])
        asking = asking + block.attn.proj(torch.cat(out, dim=1))[len(context) :]
        return asking + block.mlp(block.norm2(asking))

    patches = model.patchify(images)
    visible, masked = split_ids(mask, 37)
    tokens = model._tokens(patches, visible, masked)
    trunk = slow_run(model.decoder_blocks, tokens, 37)
    reconstruction = model.decoder_pred(model.decoder_norm(trunk))
    per_patch = loss.patch_loss(reconstruction, patches.gather(1, masked[:, :, None].expand(-1, -1, 16)))
    read = trunk if mode == "both" else slow_run(model.decoder_blocks_losspred, tokens, 37)
    predicted = model.decoder_pred_losspred(model.decoder_norm_losspred(read))
    slow = per_patch.mean() + loss.ranking_loss_plain(predicted, per_patch)
    torch.testing.assert_close(fast.loss, slow)
    torch.testing.assert_close(fast.predicted_difficulty, predicted)
    assert_alike(gradients(fast.loss, model), gradients(slow, model))


def test_a_shared_predictor_is_a_norm_and_a_line_on_the_reconstructor() -> None:
    model = doubled(predictor="shared")
    images, mask = torch.randn(1, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(1, 49), 0.75)
    trunk: list[Tensor] = []
    model.decoder_norm.register_forward_pre_hook(lambda module, inputs: trunk.append(inputs[0]))
    fast = model(images, mask).predicted_difficulty[0]
    head = model.decoder_pred_losspred
    rows = [reference.layer_norm(row, model.decoder_norm_losspred) for row in trunk[0][0]]
    slow = torch.stack([(row * head.weight[0]).sum() + head.bias[0] for row in rows])
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    assert_alike(gradients((fast * weight).sum(), model), gradients((slow * weight).sum(), model))
    assert not list(model.decoder_blocks_losspred)


def test_cross_decoders_take_the_weights_of_usual_ones() -> None:
    usual, cross = doubled(), doubled(decoder_attention="cross")
    cross.load_state_dict(usual.state_dict())
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(cross.encode(images), usual.encode(images))


def test_a_smaller_teacher_image_is_a_smaller_image() -> None:
    """Twin: a model of half the grid, with averaged positions, on averaged pixels; its map enlarged cell by cell."""
    model = doubled(input_size="32")
    small = doubled(input_size="16")
    state = {k: v for k, v in model.state_dict().items() if "pos_embed" not in k}
    for name in ("pos_embed", "decoder_pos_embed"):
        table = model.state_dict()[name][0]
        cells = [
            sum(table[1 + 8 * (2 * r + i) + 2 * c + j] for i in (0, 1) for j in (0, 1)) / 4
            for r in range(4)
            for c in range(4)
        ]
        state[name] = torch.stack([table[0], *cells])[None]
    small.load_state_dict(state)
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    averaged = (images[..., ::2, ::2] + images[..., 1::2, ::2] + images[..., ::2, 1::2] + images[..., 1::2, 1::2]) / 4
    fast, maps = model.predict_loss(images, 2), small.predict_loss(averaged).reshape(2, 4, 4)
    for row in range(8):
        for column in range(8):
            y, x = (min(max((place + 0.5) / 2 - 0.5, 0), 3) for place in (row, column))
            i, j = int(y), int(x)
            k, m = min(i + 1, 3), min(j + 1, 3)
            upper = maps[:, i, j] * (1 - (x - j)) + maps[:, i, m] * (x - j)
            lower = maps[:, k, j] * (1 - (x - j)) + maps[:, k, m] * (x - j)
            torch.testing.assert_close(fast[:, row * 8 + column], upper * (1 - (y - i)) + lower * (y - i))


def test_a_cross_decoder_is_not_exported_as_one_of_another_kind() -> None:
    form = HuggingFaceMAE()
    assert "self attention in the decoder" in form.refusal(doubled(decoder_attention="cross"))
    assert not form.refusal(doubled())


# ------------------------------------------------------------------------------------------------------ the step
@pytest.mark.parametrize("mode", MODES)
def test_fast_steps_train_everything_and_never_wait(mode: str) -> None:
    step = step_of(**MODES[mode])
    images, ids = batch(side=step.recipe.image_size[0])
    with NoSynchronisation():
        step(images, ids, torch.tensor(3), ALPHA).loss.backward()
    assert not [name for name, weight in step.named_parameters() if weight.grad is None]
    agreement = float(step.map_spearman(images))
    assert (agreement < 1) is step.recipe.approximates_teacher
    assert agreement > -1


def test_kept_maps_make_the_masks_and_there_is_no_teachers_pass() -> None:
    step = step_of(teacher_maps=True)
    images, ids = batch()
    step.difficulty = lambda images: pytest.fail("the teacher ran")  # type: ignore[method-assign]
    maps = torch.rand(6, 49, generator=torch.Generator().manual_seed(0))
    mask = step(images, ids, torch.tensor(3), ALPHA, maps).mask
    _, hard = reference.mask_counts(49, 0.75, 0.5)
    for row, values in zip(mask, maps, strict=True):
        assert row[values.argsort(descending=True)[:hard]].all()
    first = step(images, ids, torch.tensor(3), ALPHA, None).mask  # before the first maps: random, whatever alpha is
    usual = step_of(mask_policy="random", predict_loss="relative")
    assert torch.equal(first.sum(1), usual(images, ids, torch.tensor(3), ALPHA).mask.sum(1))
    assert torch.equal(first, step(images, ids, torch.tensor(3), 0 * ALPHA, maps).mask)
    assert float(step.map_spearman(images, maps)) < 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's sync debug mode watches a GPU, and there is none")
@pytest.mark.parametrize("mode", MODES)
def test_no_sync_on_a_gpu(mode: str) -> None:
    device = torch.device("cuda")
    step = step_of(**MODES[mode]).to(device)
    step._teacher[0].to(device)
    images, ids = (x.to(device) for x in batch(side=step.recipe.image_size[0]))
    number, alpha = torch.tensor(3, device=device), ALPHA.to(device)
    step(images, ids, number, alpha).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, ids, number, alpha).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_cost_is_logged_beside_mae() -> None:
    """The arithmetic of ViT-B/16: exact HPM and the shared trunk with cross attention, its teacher in every step."""
    base = recipes.from_name("hpm_vit_base_in1k_200e")
    assert flops.cost_over_mae(base) == pytest.approx(2.34, abs=0.01)
    fast = dataclasses.replace(base, **MODES["both"])
    assert flops.cost_over_mae(fast) == pytest.approx(1.61, abs=0.02)
    assert fast.fast_modes == ["predictor shared", "decoder_attention cross"]
    assert not base.fast_modes
    assert flops.cost_over_mae(recipes.from_name("hpm_vit_base_in1k_200e_fast")) == pytest.approx(0.89, abs=0.01)
    large = dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e_fast"), model="hpm_vit_large_patch16_224")
    assert flops.cost_over_mae(large) == pytest.approx(1.02, abs=0.01)


# ------------------------------------------------------------------------------------------------------ 8 bits
def test_fp8_layers_are_rounded_linear_layers() -> None:
    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(64, 32), torch.randn(2, 5, 64)
    names, before = list(layer.state_dict()), layer(tokens)
    with torch.no_grad():
        twin = fp8.linear_plain(tokens, layer.weight, layer.bias)
        assert fp8.use_fp8(layer) == 1
        got = layer(tokens)
        torch.testing.assert_close(got, twin, rtol=0.01, atol=0.01)  # of bfloat16
        torch.testing.assert_close(got, before, rtol=0.2, atol=0.2)
        assert not torch.equal(got, before)
        with fp8.exact(layer):
            assert torch.equal(layer(tokens), before)
        assert list(layer.state_dict()) == names


def test_fp8_is_refused_without_it() -> None:
    with pytest.raises(UserError, match=r"teacher_precision is fp8, but this device \(cpu\) has no 8-bit matrix"):
        fp8.require_fp8(torch.device("cpu"))


def test_eight_bits_are_refused_on_older_gpus_and_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability == (9, 0):
            fp8.require_fp8(torch.device("cuda"))
        else:
            with pytest.raises(UserError, match=r"this device \(an A100, compute capability 8\.0\) has no 8-bit"):
                fp8.require_fp8(torch.device("cuda"))
    with pytest.raises(UserError, match="int8"):
        dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), teacher_precision="int8")


# ------------------------------------------------------------------------------------------------------ compiled
def test_the_compiled_step_is_the_eager_one_and_compiled_once() -> None:
    eager, compiled = step_of(), step_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_with(counter)
    images, ids = batch()
    counts = []
    for number in range(3):  # alpha, update and weights change
        arguments = (images, ids, torch.tensor(number), torch.tensor(0.2 * number, dtype=torch.float64))
        one, two = eager(*arguments), compiled(*arguments)
        torch.testing.assert_close(two.metrics, one.metrics, rtol=1e-5, atol=1e-6)
        assert torch.equal(one.mask, two.mask)
        for step, output in ((eager, one), (compiled, two)):
            step.zero_grad()
            output.loss.backward()
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
            with torch.no_grad():
                ours -= 0.01 * theirs.grad
                theirs -= 0.01 * theirs.grad
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    for part in (compiled.run_teacher, compiled.run_student):
        assert isinstance(part, Compiled)
        assert not part.failure


def test_a_compiler_that_fails_is_named_once_and_the_step_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    step, eager = step_of(), step_of()
    step.compile_with(broken)
    for number in range(2):
        arguments = (*batch(), torch.tensor(number), ALPHA)
        torch.testing.assert_close(step(*arguments).metrics, eager(*arguments).metrics)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the teacher, the step
    assert all("warning: torch.compile of the" in line and "no compiler here" in line for line in lines)


def test_wrong_input_is_not_the_compilers_fault() -> None:
    def fails(value: Tensor) -> Tensor:
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        Compiled(fails, "it", "eager")(torch.ones(1))


# ------------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": "shared", "predictor_depth": 2}, "but predictor is shared; use 0 for both"),
        ({"predictor": "shared", "predict_loss": "none", "mask_policy": "random"}, "predictor is shared, but predict"),
        ({"decoder_attention": "cross", "model": "simmim_vit_base_patch16_224"}, "has no decoder blocks to share"),
        ({"teacher_scale": 4}, "teacher_scale 4 does not divide the grid of 14 x 14"),
        ({"teacher_scale": 2, "mask_policy": "random"}, "change the teacher, but mask_policy random uses none"),
        ({"teacher_maps": True, "mask_policy": "random"}, "teacher_maps keeps a teacher's maps of images, but"),
        ({"teacher_scale": 0}, "teacher_scale is 0, expected more than 0"),
    ],
)
def test_impossible_fast_modes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), **changes)
    assert message in str(caught.value)


def test_fast_modes_run_from_the_command_line(tmp_path: Path) -> None:
    """One process, a few updates, with every mode that a CPU has; fp8 is refused before the first."""
    flags = (
        "--recipe",
        "debug",
        "--input_size",
        32,
        "--predictor",
        "shared",
        "--decoder_attention",
        "cross",
        "--teacher_scale",
        2,
        "--teacher_maps",
        "--stop_after",
        6,
        "--log_every",
        1,
        "--steps_per_epoch",
        4,
        "--output_dir",
        tmp_path / "run",
    )
    done = run_ranks("fasthpm.pretrain", *flags, launcher="forked", ranks=1)
    assert done.status == 0, done.output
    assert (
        "fast modes: teacher_maps True, predictor shared, decoder_attention cross, teacher_scale 2; 0." in done.output
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(-1 < record["map_spearman"] < 1 for record in records[4:])
    assert [path.name for path in (tmp_path / "run" / "maps").iterdir()] == ["difficulty-00000001.maps"]
