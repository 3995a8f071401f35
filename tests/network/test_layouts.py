"""Weight files as people have them."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import families, image_size_of, randomize_batchnorm
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.common.cli import StageError
from stages.network.backbones import stock_model
from stages.network.weights import find_weights, load_into


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    randomize_batchnorm(model, least_variance=0.0)
    return model.eval()


def load(arch: str, path: Path, image_size: int = 224) -> nn.Module:
    stock = stock_model(arch, image_size)
    load_into(stock, find_weights(arch, str(path)), arch)
    return stock.eval()


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("convnext_tiny", "convnext_tiny"),
        ("mobilenet_v3_large", "mobilenetv3_large_100"),
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("vit_b_32", "vit_base_patch32_224"),
    ],
)
def test_a_timm_file_gives_timms_logits(arch: str, name: str, tmp_path: Path) -> None:
    model = randomize(timm.create_model(name, pretrained=False))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        expected, logits = model(images), load(arch, tmp_path / "timm.safetensors")(images)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def small() -> dict[str, Tensor]:
    return randomize(stock_model("mobilenet_v3_small")).state_dict()


def without_classifier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier.")}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        without_classifier,
        lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.module.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": tensors, "optimizer": {"state": {}}, "epoch": 3},
        lambda tensors: {"model_state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}},
        lambda tensors: {"state_dict": {"model": without_classifier(tensors)}},
    ],
)
def test_tensors_are_found_inside_wrappers_and_prefixes(wrap: object, tmp_path: Path) -> None:
    tensors = small()
    torch.save(wrap(tensors), tmp_path / "weights.pth")  # type: ignore[operator]
    loaded = load("mobilenet_v3_small", tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items() if key.startswith("features."))


@pytest.mark.parametrize(
    ("tensors", "owner"),
    [
        ({"layers.0.blocks.0.attn.qkv.weight": torch.zeros(1)}, "timm's"),
        ({"vit.embeddings.cls_token": torch.zeros(1)}, "Hugging Face transformers'"),
        ({"visual.conv1.weight": torch.zeros(1)}, "CLIP's"),
        ({"model.layer1.0.conv1.weight": torch.zeros(1), "loss.weight": torch.zeros(1)}, "PyTorch Lightning's"),
    ],
)
def test_a_refusal_says_which_library_a_file_is_from(tensors: dict[str, Tensor], owner: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(StageError, match=f"is not for swin_t: it lacks .*; its names are {owner}"):
        load("swin_t", tmp_path / "weights.pth")


@pytest.mark.parametrize("arch", families())
def test_a_plain_dictionary_of_tensors_is_loaded_into_every_family(arch: str, tmp_path: Path) -> None:
    stock = randomize(stock_model(arch, image_size_of(arch)))
    torch.save(dict(stock.state_dict()), tmp_path / "weights.pth")
    loaded = load(arch, tmp_path / "weights.pth", image_size_of(arch)).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stock.state_dict().items())


@pytest.mark.parametrize("size", [96, 384])
def test_position_embeddings_are_interpolated_to_the_image_size(size: int, tmp_path: Path) -> None:
    stock = stock_model("vit_b_32", 224)
    with torch.no_grad():  # a slope, which interpolation keeps
        slope = torch.linspace(0, 1, 7).repeat_interleave(7)
        stock.encoder.pos_embedding[0, 1:] = slope[:, None]
    save_file(stock.state_dict(), tmp_path / "vit.safetensors")
    positions = load("vit_b_32", tmp_path / "vit.safetensors", size).encoder.pos_embedding.detach()[0]
    side = size // 32
    assert positions.shape == (1 + side**2, 768)
    rows = positions[1:, 0].reshape(side, side)
    assert (rows.diff(dim=0) > 0).all()
    assert torch.allclose(rows, rows[:, :1].expand(-1, side), atol=1e-5)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_a_file_with_auxiliary_classifiers_is_loaded_and_its_images_are_normalized_as_in_training(
    arch: str, tmp_path: Path
) -> None:
    stock = stock_model(arch).eval()
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    weights = find_weights(arch, str(tmp_path / "weights.safetensors"))
    load(arch, tmp_path / "weights.safetensors")
    stock.transform_input = True  # as torchvision sets it for its weights
    size = weights.preprocessing.crop
    image = torch.rand(1, 3, size, size)

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.inference_mode():
        expected = stock(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        stock.transform_input = False
        logits = stock(normalized(weights.preprocessing.mean, weights.preprocessing.std))
    assert torch.allclose(logits, expected, atol=1e-5)
