"Semantic image segmentation from K-means to adversarial training: a course that is also a library."

__version__ = "0.1.0"

import importlib

# The public names and the module (= chapter) that each lives in. They are imported on first use, so `import synseg` is quick.
_PUBLIC = {
    "core": ("VOID", "seed_everything", "default_device", "record_result", "load_result"),
    "check": ("test_same", "expect_fail", "check_segmenter", "count_parameters", "trace", "receptive_field"),
    "labels": ("LabelSpace", "label_space", "check_labels"),
    "scenes": ("Scenes",),
    "transforms": ("train_transforms", "eval_transforms"),
    "datasets": ("load_dataset",),
    "labelme": ("import_labelme",),
    "shards": ("Shards", "write_shards"),
    "show": ("show_segmentation", "overlay"),
    "metrics": ("ConfusionMatrix", "trimap_iou", "boundary_iou"),
    "losses": ("CrossEntropyLoss", "FocalLoss", "DiceLoss", "LovaszSoftmaxLoss", "median_frequency_weights"),
    "segmenter": ("ModelInfo", "Segmenter"),
    "wiring": ("trace_network",),
    "diagram": ("draw_network",),
    "zoo": ("list_models", "model_info", "create_model", "save_model", "load_model"),
    "compress": ("fold_batchnorm", "prune_filters"),
    "train": ("Learner",),
    "discriminators": ("list_discriminators", "discriminator_info", "create_discriminator"),
    "realism": ("frechet_distance", "kernel_distance", "ssim", "perceptual_distance", "feature_extractor"),
    "simgan": ("Refiner", "HistoryBuffer"),
    "inference": ("predict",),
    "deploy": ("export",),
    "kmeans": ("KMeansSegmenter",),
    "grid_crf": ("GridCRF", "log_probs_from_labels"),
    "dense_crf": ("DenseCRF",),
    "conv_crf": ("ConvCRF",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'synseg' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__():
    return sorted([*globals(), *__all__])
