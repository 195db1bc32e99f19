#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549): the server leaves out the probabilities of a token that ends inside a character.
# `/completion` with n_probs gives `completion_probabilities`, an entry a token - but not for a token whose bytes are the beginning of a
# character that is longer, as byte-level tokenizers have for every script but Latin. With n_predict 1 the whole field is absent then, and
# the reply is otherwise a success: which tokens a script finds probabilities of depends on what the model would have said next.
# Seen for one random model with a byte-level tokenizer: a token of a whole letter has its probabilities, over the whole vocabulary, and the
# first byte of a Cyrillic letter has none. logit_bias makes either come; the probabilities that are given do not show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q numpy==2.4.6 tokenizers==0.23.3 gguf==0.19.0 xllamacpp==2026.10.11549
export HF_HUB_OFFLINE=1
"$python" - "$folder" 2> "$folder/said" << 'EOF' || { tail -5 "$folder/said" >&2; exit 1; }
import json
import sys
import urllib.request

import gguf
import numpy
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def ask(base, path, body):
    asked = urllib.request.Request(f"{base}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(asked, timeout=60))


def write(file, tokenizer, pre, seed=0):
    """A random Llama of one layer with this BPE tokenizer."""
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    random = numpy.random.default_rng(seed)
    hidden, heads, width = 64, 2, 96
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 256),
        (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, width),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3] + [1] * (len(tokens) - 1)),
        (writer.add_token_merges, [" ".join(pair) for pair in content["merges"]]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0),
        (writer.add_add_bos_token, False),
    ):
        add(value)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "blk.0.ffn_down": (hidden, width)}
    shapes |= {f"blk.0.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, hidden) for name in ("ffn_gate", "ffn_up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(numpy.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(["some words to merge, some more words"] * 50, trainer)
file = f"{sys.argv[1]}/model.gguf"
write(file, tokenizer, "gpt-2")
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.port = file, 256, False, 0
server = xllamacpp.Server(params)
vocabulary = tokenizer.get_vocab_size()
letter, first_byte = tokenizer.encode("a").ids[0], tokenizer.encode("\u0416").ids[0]
for name, token, given in (("a letter", letter, True), ("the first byte of a letter", first_byte, False)):
    body = {"prompt": [5, 6, 7], "n_predict": 1, "n_probs": vocabulary, "temperature": 0, "logit_bias": [[token, 1e4]], "return_tokens": True}
    reply = ask(server.listening_address, "completion", body)
    check(reply["tokens"] in ([token], []), "another token came")
    found = reply.get("completion_probabilities")
    print(f"{name}: {len(found[0]['top_logprobs']) if found else 'no'} probabilities")
    check(bool(found) == given, f"{name} is expected to have {'its' if given else 'no'} probabilities")
    if found:
        most = max(entry["logprob"] for entry in found[0]["top_logprobs"])
        check(len(found[0]["top_logprobs"]) == vocabulary and most < -0.01, "the bias shows in the probabilities")
print("as described")
EOF
