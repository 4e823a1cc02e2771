"""Run by the Python of another environment, which has TensorFlow: what the models' own graphs make of pictures.

Usage: python tensorflow_graph.py FOLDER. FOLDER has pictures.pickle, {name: bytes}, and stages.json, {name: image
stage}. Writes results.pickle: {name: error or {"decode_jpeg" | "decode_png" | stage: array}}.
"""

import json
import pickle
import sys
from pathlib import Path

import tensorflow as tf

tf1 = tf.compat.v1


def resized(image, resize):
    """As the models' preprocessing has it: float32 arithmetic, sizes cut to int."""
    if resize["exact"]:
        size = tf1.constant(resize["exact"], tf.int32)
    else:
        shape = tf1.to_float(tf1.shape(image)[:2])
        scale = tf1.to_float(tf1.constant(resize["shorter"])) / tf1.reduce_min(shape)
        size = tf1.stack([tf1.to_int32(shape[0] * scale), tf1.to_int32(shape[1] * scale)])
    return tf1.image.resize_bilinear(tf1.expand_dims(image, 0), size, align_corners=False)[0]


def cropped(image, crop):
    shape = tf1.shape(image)
    top, left = (tf1.to_int32((shape[axis] - crop[axis]) / 2) for axis in (0, 1))
    return tf1.slice(image, [top, left, 0], [crop[0], crop[1], 3])


def prepared(image, stage):
    image = tf1.to_float(image)
    if stage["resize"]:
        image = resized(image, stage["resize"])
    if stage["crop"]:
        image = cropped(image, stage["crop"])
    image = (image - tf1.constant(stage["mean"], tf.float32)) / tf1.constant(stage["std"], tf.float32)
    if stage["order"] == "BGR":
        image = tf1.reverse(image, [-1])
    image = image * tf1.constant(stage["scale"], tf.float32)
    return tf1.transpose(image, [2, 0, 1]) if stage["layout"] == "NCHW" else image


def main(folder):
    pictures = pickle.loads((folder / "pictures.pickle").read_bytes())
    stages = json.loads((folder / "stages.json").read_text())
    results = {}
    with tf1.Graph().as_default(), tf1.Session() as session:
        item = tf1.placeholder(tf.string, [])
        wanted = {"decode_jpeg": tf1.image.decode_jpeg(item, channels=3)}
        wanted["decode_png"] = tf1.image.decode_png(item, channels=3)
        wanted |= {name: prepared(wanted["decode_png"], stage) for name, stage in stages.items()}
        for name, content in pictures.items():
            try:
                results[name] = session.run(wanted, {item: content})
            except tf.errors.InvalidArgumentError as error:
                results[name] = str(error)
    (folder / "results.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
