"""LVIS: repeat factors and the federated loss as the papers and detectron2 state them; its AP by pycocotools."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasthpm.dense.detection import lvis
from fasthpm.dense.detection.ap import Found, average_precision
from fasthpm.dense.detection.coco import open_set
from fasthpm.dense.detection.masks import run_lengths
from fasthpm.dense.detection.network import SMALL, build_detector
from fasthpm.dense.detection.vitdet import Windows
from fasthpm.model import HPMViT


def test_repeat_factors_as_loops(content: Any, write: Any) -> None:
    """Three in a thousand images have class 3, one class 1; the rarest decides."""
    labels = [[2]] * 996 + [[2, 3], [3], [1, 3], []]
    found = lvis.repeat_factors(labels, 3, 0.01)
    assert np.array_equal(lvis.image_counts(labels, 3), [1, 997, 3])
    for row, factor in zip(labels, found, strict=True):
        wanted = 1.0
        for label in row:
            share = sum(label in other for other in labels) / len(labels)
            wanted = max(wanted, (0.01 / share) ** 0.5)
        assert factor == pytest.approx(wanted)
    data = open_set(write(content), write(content).with_suffix("") / "images", train=True)
    assert lvis.labels_of(data) == [[1, 2], [1]]


def test_federated_loss_as_loops() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 81, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 80, 3, 0, 7])
    weights = torch.rand(80, dtype=torch.float64)
    weights[20] = 0  # of no image
    torch.manual_seed(5)
    loss = lvis.federated_loss(scores, labels, weights)
    torch.manual_seed(5)
    chosen = lvis.classes_of_loss(labels, weights)
    assert int(chosen.sum()) == lvis.CLASSES_OF_LOSS
    assert all(chosen[label - 1] == 1 for label in (3, 80, 7))
    assert chosen[20] == 0
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(scores, labels.tolist(), strict=True):
        for k in range(80):
            if chosen[k]:
                total = total + F.softplus(-row[k + 1] if label == k + 1 else row[k + 1])
    torch.testing.assert_close(loss, total / 6)
    grads = [torch.autograd.grad(each, scores, retain_graph=True)[0] for each in (loss, total / 6)]
    torch.testing.assert_close(*grads)
    assert not grads[0][:, 0].any()


def test_other_classes_are_drawn_by_their_weights() -> None:
    torch.manual_seed(0)
    weights = torch.cat([torch.full((100,), 0.01), torch.full((100,), 1.0)])
    counts = sum(lvis.classes_of_loss(torch.tensor([0, 1]), weights) for _ in range(50))
    assert counts[0] == 50
    assert counts[100:].sum() > 10 * counts[1:100].sum()
    few = lvis.classes_of_loss(torch.tensor([0]), torch.ones(20))
    assert int(few.sum()) == 20


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    model = HPMViT(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_depth=1, decoder_num_heads=2)
    made = build_detector(model, Windows((8, 8)), SMALL, 60, seed=0)
    made.roi_heads = lvis.FederatedHeads(made.roi_heads, np.arange(60))
    return made


def test_the_heads_are_torchvisions_but_for_the_classes(net: Any) -> None:
    """The other four losses are those of torchvision's heads; every parameter has a gradient, without objects too."""
    box = torch.tensor([[4.0, 8.0, 40.0, 44.0]])
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 8:44, 4:40] = 1
    images, target = torch.randn(1, 3, 64, 64), {"boxes": box, "labels": torch.tensor([5]), "masks": mask}
    plain = copy.deepcopy(net)
    plain.roi_heads.__class__ = lvis.RoIHeads
    losses = []
    for each in (net, plain):
        torch.manual_seed(1)
        losses.append(each.train()(images, [target]))
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0].keys() - {"loss_classifier"}:
        torch.testing.assert_close(losses[0][name], losses[1][name])
    empty = {"boxes": box[:0], "labels": target["labels"][:0], "masks": mask[:0]}
    sum(net(images, [empty]).values()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_detections_of_sigmoids(net: Any) -> None:
    """As loops: every class of every region above the threshold, then non-maximum suppression per class."""
    heads = net.roi_heads.eval()
    heads.score_thresh, heads.detections_per_img, heads.nms_thresh = 0.6, 500, 1.0
    torch.manual_seed(0)
    scores, boxes = torch.randn(5, 61), torch.randn(5, 61 * 4) * 0.1
    regions = [torch.tensor([[5.0, 5.0, 30.0, 30.0]]).repeat(3, 1), torch.tensor([[9.0, 5.0, 50.0, 30.0]]).repeat(2, 1)]
    found = heads.postprocess_detections(scores, boxes, regions, [(64, 64)] * 2)
    wanted = [
        sorted(
            round(float(scores[row, k].sigmoid()), 5)
            for row in rows
            for k in range(1, 61)
            if scores[row, k].sigmoid() > 0.6
        )
        for rows in (range(3), range(3, 5))
    ]
    assert [sorted(round(float(value), 5) for value in each) for each in found[1]] == wanted
    assert all(each.min() >= 1 for each in found[2])
    assert [each.shape[1] for each in found[0]] == [4, 4]


def federated(content: Any) -> Any:
    for category, frequency in zip(content["categories"], "rf", strict=True):
        category["frequency"] = frequency
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["images"][1]["neg_category_ids"] = [7]
    content["images"][0]["not_exhaustive_category_ids"] = [3]
    return content


def test_ap_counts_only_what_is_known(content: Any, write: Any) -> None:
    """Detections of a class that nobody looked for in an image do not count, nor do wrong ones of a class that is not
    exhaustively annotated; those of a class that is known not to be there do."""
    path = write(federated(content))
    data = open_set(path, Path(path.with_suffix("")) / "images", train=False)
    truth = data.truth(range(3))["annotations"]
    sizes = [(data.image(k).height, data.image(k).width) for k in range(3)]
    right = [
        {**row, "score": 0.5, "segmentation": run_lengths(row["segmentation"], *sizes[row["image_id"]])}
        for row in truth
    ]

    def wrong(sample: int, label: int) -> dict[str, Any]:
        mask = run_lengths([[0, 0, 3, 0, 3, 3, 0, 3]], *sizes[sample])
        where = {"bbox": [0, 0, 3, 3], "segmentation": mask}
        return {**where, "image_id": sample, "category_id": label, "score": 0.9}

    def ap(*more: dict[str, Any]) -> dict[str, float]:
        return average_precision(data, Found({0, 1, 2}, [dict(row) for row in (*right, *more)]))[0]

    perfect = ap()
    assert perfect["box_ap"] == perfect["mask_ap"] == pytest.approx(100)
    assert perfect["box_ap_rare"] == perfect["box_ap_frequent"] == pytest.approx(100)
    assert "box_ap_common" not in perfect
    assert ap(wrong(2, 1), wrong(2, 2))["box_ap"] == pytest.approx(100)  # nobody looked
    assert ap(wrong(0, 1))["box_ap"] == pytest.approx(100)  # not all are annotated
    assert ap(wrong(1, 2))["box_ap_rare"] == pytest.approx(50)  # there is no cat
    assert ap(wrong(0, 2))["box_ap_rare"] == pytest.approx(50)
    assert ap(wrong(1, 1))["box_ap_frequent"] < 100
