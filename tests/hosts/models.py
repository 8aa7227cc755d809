"""The table of hosts: models of other packages, each with a small input and the swaps that apply to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# isort: off
from testing import torchvision_stub  # noqa: F401 (must come first)
import timm
import torchvision
# isort: on

from torch_geometric.nn import MLP, EdgeConv, global_max_pool
from torch_geometric.nn.models import EdgeCNN
from torchvision.models import detection, segmentation

from paper_layers.deep_gcn import knn_graph

CLASSES = 5


@dataclass(frozen=True)
class Host:
    """A model, its input, and the swaps that apply to it; every other swap finds nothing in it.

    Attributes:
        build: Makes the model, with one class where `big_bigan` applies.
        swaps: Names of swaps.
        size: Height and width of the images.
        arguments: Makes the arguments of a training step and of an evaluation; default the images alone.
        point_rend: Arguments of `swap.point_rend`.
    """

    build: Callable[[], nn.Module]
    swaps: str
    size: int = 64
    arguments: Callable[[bool], tuple[Any, ...]] | None = None
    point_rend: tuple[tuple[str, Any], ...] = ()

    def inputs(self, training: bool) -> tuple[Any, ...]:
        return self.arguments(training) if self.arguments else (torch.randn(4, 3, self.size, self.size),)


class Segmenter(nn.Module):
    """One of timm's backbones with a head on its last map, as one writes it."""

    def __init__(self, name: str):
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True)
        strides = self.encoder.feature_info.reduction()
        self.fine, self.level = nn.Identity(), strides.index(4)
        self.head = nn.Conv2d(self.encoder.feature_info.channels()[-1], CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.encoder(image)
        self.fine(maps[self.level])
        return F.interpolate(self.head(maps[-1]), image.shape[2:], mode="bilinear")


class Logits(nn.Module):
    """One of transformers' segmenters that returns its logits in the size of the image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.model(pixel_values=image).logits, image.shape[2:], mode="bilinear")


class DGCNN(nn.Module):
    """The point-cloud classifier of PyG's examples, smaller; `dynamic` makes its layers."""

    def __init__(self, dynamic: Callable[..., nn.Module]):
        super().__init__()
        self.conv1 = dynamic(MLP([2 * 3, 16, 16]), 6, "max")
        self.conv2 = dynamic(MLP([2 * 16, 32]), 6, "max")
        self.linear = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        first = self.conv1(x, batch)
        second = self.conv2(first, batch)
        return self.linear(global_max_pool(torch.cat([first, second], 1), batch))


class NearestEdgeConv(nn.Module):
    """A dynamic convolution made of PyG's static one."""

    def __init__(self, network: nn.Module, k: int, aggr: str):
        super().__init__()
        self.conv, self.k = EdgeConv(network, aggr), k

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return self.conv(x, knn_graph(x, self.k, batch))


def _dgcnn() -> nn.Module:
    from paper_layers.deep_gcn import DynamicEdgeConv

    return DGCNN(DynamicEdgeConv)


def _cloud(training: bool) -> tuple[Any, ...]:
    return torch.randn(40, 3), torch.arange(4).repeat_interleave(10)


def _graph(training: bool) -> tuple[Any, ...]:
    x = torch.randn(40, 3)
    return x, knn_graph(x, 4)


def _scenes(training: bool) -> tuple[Any, ...]:
    """Two images, and in training an object in each."""
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    if not training:
        return (images,)
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
            "keypoints": torch.tensor([[[8.0, 8.0, 1.0], [20.0, 30.0, 1.0], [36.0, 12.0, 1.0]]]),
        }
        for image in images
    ]
    return images, targets


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=1, **options)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if name not in ("alexnet", "vgg11"):
            return getattr(torchvision.models, name)(num_classes=1, weights=None, **options)
        with torch.device("meta"):  # Their classifiers have 100 million parameters.
            model = getattr(torchvision.models, name)()
        model.classifier = nn.Linear(model.classifier[-6 if name == "alexnet" else 0].in_features, 1, device="meta")
        model.to_empty(device="cpu")
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        return model

    return build


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)


def _detection(name: str, **options: Any) -> Host:
    def build() -> nn.Module:
        return getattr(detection, name)(
            weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, **options
        )

    swaps = "pooling strided_conv split_batch_norm" + (" point_rend" if "mask" in name else "")
    return Host(build, swaps, arguments=_scenes)


def _transformers(
    model: str, fine: str, coarse: str, swaps: str, *, backbone: str | None = None, **options: Any
) -> Host:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{model}Config")
        settings = {"num_labels": CLASSES, **options}
        if backbone is not None:
            settings["backbone_config"] = getattr(transformers, f"{backbone}Config")(**_STAGES)
        return Logits(getattr(transformers, f"{model}ForSemanticSegmentation")(config(**settings)))

    names = (("fine", f"model.{fine}"), ("coarse", f"model.{coarse}"))
    return Host(build, swaps, point_rend=names)


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 8, "layer_type": "basic"}
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            backbone_config=ResNetConfig(out_features=["stage4"], **sizes),
            d_model=16,
            num_queries=5,
            **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _LAYERS.items()},
        )
    )


_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_features": [f"stage{i}" for i in range(1, 5)]}
_LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def _smp(name: str) -> Host:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, classes=CLASSES)

    names = (("fine", "encoder.layer1"), ("coarse", "segmentation_head.0"))
    return Host(build, "pooling strided_conv split_batch_norm point_rend", point_rend=names)


_POOLS, _CONVS, _NORMS, _GAN = "pooling ", "strided_conv ", "split_batch_norm ", "big_bigan "
# timm's families, by the swaps that apply, and whether the family gives a map of stride 4.
_TIMM: list[tuple[str, str, bool]] = [
    ("test_resnet", _POOLS + _CONVS + _NORMS, True),
    ("test_efficientnet", _CONVS + _NORMS, True),
    ("test_vit", "", False),
    ("resnet18", _POOLS + _CONVS + _NORMS, True),
    ("resnet26d", _POOLS + _CONVS + _NORMS, True),
    ("resnext26ts", _POOLS + _CONVS + _NORMS, True),
    ("efficientnet_b0", _CONVS + _NORMS, True),
    ("mobilenetv3_small_050", _CONVS + _NORMS, True),
    ("densenet121", _POOLS + _CONVS + _NORMS, True),
    ("regnetx_002", _CONVS + _NORMS, True),
    ("vgg11", _POOLS, True),
    ("vgg11_bn", _POOLS + _NORMS, True),
    ("inception_v3", _POOLS + _CONVS + _NORMS, False),
    ("legacy_xception", _POOLS + _CONVS + _NORMS, True),
    ("dla46_c", _POOLS + _CONVS + _NORMS, True),
    ("hrnet_w18_small", _CONVS + _NORMS, True),
    ("convnext_atto", _CONVS, True),
    ("vit_tiny_patch16_224", "", False),
    ("mobileone_s0", _CONVS + _NORMS, True),
    ("fastvit_t8", _CONVS + _NORMS, True),
    ("efficientvit_b0", _CONVS + _NORMS, True),
    ("repvgg_a0", _CONVS + _NORMS, True),
    ("ghostnet_050", _CONVS + _NORMS, True),
]
_SMALL: dict[str, dict[str, Any]] = {
    "vgg11": {"mlp_ratio": 1 / 128},
    "vgg11_bn": {"mlp_ratio": 1 / 128},
    "test_vit": {"img_size": 64},
    "vit_tiny_patch16_224": {"img_size": 64},
}
_TORCHVISION: list[tuple[str, str, int]] = [
    ("alexnet", _POOLS + _CONVS, 64),
    ("squeezenet1_1", _POOLS + _CONVS, 64),
    ("googlenet", _POOLS + _CONVS + _NORMS, 64),
    ("inception_v3", _POOLS + _CONVS + _NORMS, 96),
    ("resnet18", _POOLS + _CONVS + _NORMS, 64),
    ("vgg11", _POOLS, 64),
    ("mobilenet_v2", _CONVS + _NORMS, 64),
    ("mobilenet_v3_small", _CONVS + _NORMS, 64),
    ("shufflenet_v2_x0_5", _POOLS + _CONVS + _NORMS, 64),
    ("densenet121", _POOLS + _CONVS + _NORMS, 64),
    ("efficientnet_b0", _CONVS + _NORMS, 64),
    ("mnasnet0_5", _CONVS + _NORMS, 64),
    ("regnet_x_400mf", _CONVS + _NORMS, 64),
    ("convnext_tiny", _CONVS, 64),
]
_AUXILIARY = {
    "googlenet": {"aux_logits": True, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
# The hosts of `make test`.
QUICK = {
    "timm test_resnet",
    "timm test_efficientnet",
    "timm test_vit",
    "timm mobilenetv3_small_050",
    "timm efficientvit_b0",
    "timm test_resnet segmenter",
    "torchvision squeezenet1_1",
    "torchvision shufflenet_v2_x0_5",
    "torchvision lraspp_mobilenet_v3_large",
    "PyG EdgeCNN",
    "PyG DGCNN",
    "PyG DGCNN of static convolutions",
}

_FOUR = [8, 8, 16, 16]
HOSTS: dict[str, Host] = {
    **{
        f"timm {name}": Host(_timm(name, **_SMALL.get(name, {})), swaps + _GAN, 128 if "inception" in name else 64)
        for name, swaps, _ in _TIMM
    },
    **{
        f"timm {name} segmenter": Host(
            lambda name=name: Segmenter(name), swaps + "point_rend", point_rend=(("fine", "fine"), ("coarse", "head"))
        )
        for name, swaps, has_stride_4 in _TIMM
        if has_stride_4
    },
    **{
        f"torchvision {name}": Host(_torchvision(name, **_AUXILIARY.get(name, {})), swaps + _GAN, size)
        for name, swaps, size in _TORCHVISION
    },
    **{
        f"torchvision {name}": Host(_segmentation(name), swaps + "point_rend")
        for name, swaps in {
            "fcn_resnet50": _POOLS + _CONVS + _NORMS,
            "deeplabv3_resnet50": _POOLS + _CONVS + _NORMS,
            "lraspp_mobilenet_v3_large": _CONVS + _NORMS,
        }.items()
    },
    "torchvision fasterrcnn_resnet50_fpn": _detection("fasterrcnn_resnet50_fpn", box_detections_per_img=9),
    "torchvision maskrcnn_resnet50_fpn": _detection("maskrcnn_resnet50_fpn", box_detections_per_img=9),
    "torchvision keypointrcnn_resnet50_fpn": _detection(
        "keypointrcnn_resnet50_fpn", num_keypoints=3, box_detections_per_img=9
    ),
    "torchvision retinanet_resnet50_fpn": _detection("retinanet_resnet50_fpn"),
    "torchvision fcos_resnet50_fpn": _detection("fcos_resnet50_fpn"),
    "torchvision ssd300_vgg16": Host(
        lambda: detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3, topk_candidates=9),
        _POOLS + _CONVS,
        arguments=_scenes,
    ),
    "torchvision ssdlite320_mobilenet_v3_large": Host(
        lambda: detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3, topk_candidates=9
        ),
        _CONVS + _NORMS,
        arguments=lambda training: tuple(part * 2 for part in _scenes(training)),
    ),
    "PyG EdgeCNN": Host(lambda: EdgeCNN(3, 8, 2, CLASSES, norm="batch"), _NORMS + "graph_conv", arguments=_graph),
    "PyG DGCNN": Host(_dgcnn, _NORMS + "graph_conv", arguments=_cloud),
    "PyG DGCNN of static convolutions": Host(lambda: DGCNN(NearestEdgeConv), _NORMS + "graph_conv", arguments=_cloud),
    "transformers SegFormer": _transformers(
        "Segformer",
        "segformer.stages.0.patch_embeddings.proj",
        "decode_head.classifier",
        _CONVS + _NORMS + "point_rend",
        depths=[1, 1, 1, 1],
        hidden_sizes=_FOUR,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "transformers UperNet": _transformers(
        "UperNet",
        "backbone.encoder.stages.0",
        "decode_head.classifier",
        _CONVS + _NORMS + "point_rend",
        backbone="ConvNext",
        hidden_size=16,
        use_auxiliary_head=False,
    ),
    "transformers DPT": _transformers(
        "DPT",
        "neck.convs.0",
        "head.head.4",
        _CONVS + _NORMS + "point_rend",
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=_FOUR,
        fusion_hidden_size=8,
        use_auxiliary_head=False,
    ),
    "transformers DETR": Host(_detr, _POOLS + _CONVS),
    "smp FPN": _smp("FPN"),
    "smp DeepLabV3Plus": _smp("DeepLabV3Plus"),
    "smp UPerNet": _smp("UPerNet"),
}
