"""What is summed up for metrics.jsonl."""

from pathlib import Path

import pytest
import torch

from fasthpm.run import metrics


def test_spikes_reach_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        log = metrics.Metrics(
            tmp_path,
            rank=0,
            world_size=1,
            total_steps=99,
            first_step=0,
            flops_per_sample=1.0,
            matmul_rate=1.0,
            device=torch.device("cpu"),
            shown=("loss", "teacher_spearman"),
        )
        for update in range(60):
            values = torch.full((len(metrics.METRICS),), 3.0 if update == 57 else 1.0)
            log._sum, log._count, log._samples = log._sum + values, log._count + 1, log._samples + 4
            log._recent.append((update, torch.zeros(4), torch.zeros(4), values))
            log.updated(update, 1.0)
        others = {"lr": 0.0, "alpha": 0.0, "ema_momentum": 0.0, "bad_samples": 0.0, "skipped_updates": 0.0}
        record = log.read(60, 1.0, 0.0, **others)
        log.close()
    finally:
        torch.distributed.destroy_process_group()
    assert record["loss_spikes"] == 1
    assert set(record) & set(metrics.METRICS) == {"loss", "teacher_spearman"}
    assert "warning: the loss of update 58 is 3, the median before it 1" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "sides"), [(1e12, [256, 512, 1024, 2048]), (5e9, [256, 512]), (1e8, [256])])
def test_a_slow_processor_is_measured_on_small_products(
    monkeypatch: pytest.MonkeyPatch, rate: float, sides: list[int]
) -> None:
    asked: list[int] = []

    def seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
        asked.append(size)
        return 2 * size**3 / rate

    monkeypatch.setattr(metrics, "_product_seconds", seconds)
    assert metrics.measure_matmul_rate(torch.device("cpu"), torch.bfloat16) == pytest.approx(rate)
    assert asked == sides
