#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549): a draft model alone is loaded and never asked.
# Naming a draft model is not enough for speculative decoding: the type of speculation (`--spec-type draft-simple`, here `speculative.types`)
# has to be named too. Without it the draft model's file is opened and takes its memory, the server starts, and every token is the target's
# own: no error, and timings without `draft_n` are all that shows. With the type, timings count guesses, and a model that is its own draft
# has all of them accepted.
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
written = {}
for named in (False, True):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = file, 256, False, 0
    params.speculative.draft.mparams.path, params.speculative.draft.n_max = file, 4
    if named:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    server = xllamacpp.Server(params)
    body = {"prompt": [5, 6, 7], "n_predict": 24, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    reply = ask(server.listening_address, "completion", body)
    guessed, accepted = (reply["timings"].get(name, 0) for name in ("draft_n", "draft_n_accepted"))
    print(f"type of speculation {'named' if named else 'not named'}: {guessed} guesses, {accepted} accepted")
    check((guessed > 0) == named, "guesses with the type alone")
    check(accepted == guessed, "a model accepts its own guesses")
    written[named] = reply["tokens"]
check(written[True] == written[False], "the tokens are the same")
print("as described")
EOF
