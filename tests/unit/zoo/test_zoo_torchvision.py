"""torchvision's ImageNet classifiers by name, never with downloaded weights."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError
from deploy_sparse.zoo import imagenet


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_a_classifier_by_name():
    found = zoo.entry("torchvision/resnet50")
    assert found.input_shape == (3, 224, 224)
    with torch.device("meta"):
        assert parameters(zoo.build("torchvision/resnet50")) == 25_557_032  # torchvision's documented num_params
        small = zoo.build("torchvision/resnet50", classes=10)
    assert small.fc.weight.shape == (10, 2048)


def test_the_number_of_classes_has_two_names():
    with torch.device("meta"):
        for key in ("classes", "num_classes"):
            assert zoo.build("torchvision/mobilenet_v2", **{key: 5}).classifier[1].out_features == 5
    with pytest.raises(ConfigError, match="classes and num_classes are the same argument"):
        zoo.build("torchvision/mobilenet_v2", classes=5, num_classes=5)


def test_only_classifiers_are_known():
    assert zoo.known("torchvision/resnet18")
    for other in ("torchvision/fcn_resnet50", "torchvision/raft_small", "torchvision/quantized_resnet18"):
        assert not zoo.known(other)
    assert not zoo.known("resnet101")


def test_unknown_names_get_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown network 'torchvision/resnet51'[\s\S]*did you mean 'torchvision/resnet5"
    ):
        zoo.build("torchvision/resnet51")
    with pytest.raises(ConfigError, match=r"a classifier of torchvision\.models[\s\S]*list_models"):
        zoo.entry("torchvision/")


@pytest.mark.parametrize("argument", [{"weights": "DEFAULT"}, {"pretrained": True}])
def test_weights_are_never_downloaded(argument, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    with torch.device("meta"), pytest.raises(ConfigError, match="'torchvision/resnet18' cannot be built with"):
        zoo.build("torchvision/resnet18", **argument)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_off_so_training_sees_logits(name):
    with torch.device("meta"):
        network = zoo.build(f"torchvision/{name}", classes=10).train()
        assert network(torch.zeros(2, 3, 224, 224)).shape == (2, 10)


def test_check_builds_on_the_meta_device_even_what_reads_numbers_back():
    network = zoo.check("torchvision/regnet_y_400mf", {"classes": 10}, (3, 224, 224), 10)
    assert {p.device.type for p in network.parameters()} == {"meta"}


def test_check_refuses_images_of_another_size():
    with pytest.raises(ConfigError, match=r"makes an error \(Wrong image height! Expected 224 but got 32!\)"):
        zoo.check("torchvision/vit_b_16", {"classes": 10}, (3, 32, 32), 10)


def test_weights_are_drawn_from_the_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(zoo.build("torchvision/squeezenet1_1", classes=4).state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.slow
def test_every_classifier_classifies():
    assert len(imagenet.names()) > 50
    for name in imagenet.names():
        zoo.check(f"torchvision/{name}", {"classes": 7}, imagenet.INPUT_SHAPE, 7)
