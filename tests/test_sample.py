"""The sampler as a user meets it: text, streams, stop texts, and one clear line for what cannot be done."""

import dataclasses
import gc

import pytest
import torch
from util import script

import checkpoint
import sample
from config import UserError
from data.tokenizer import ByteTokenizer, CharTokenizer
from engine import Request, generate
from model import GPT, ModelConfig

BYTES, CHARS = ByteTokenizer(), CharTokenizer("abcdefgh\n")


def make(tokenizer, **keys):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "max_seq_len": 64, "pos": "rope", "tie_embeddings": False}
    model = GPT(ModelConfig(**{**shape, "vocab_size": tokenizer.vocab_size + 30, **keys})).eval()  # 30 rows of padding
    model.init_weights(seed=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 12
    return model


def save(folder, tokenizer, **keys):
    model = make(tokenizer, **keys)
    state = {"step": 1, "time_s": 0.0, "val_loss": 1.0, "tokenizer": tokenizer.spec}
    checkpoint.save(folder, model, torch.optim.AdamW(model.parameters()), state, keep=1)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of small models by name."""
    folder = tmp_path_factory.mktemp("out")
    return {
        "chars": save(folder / "chars", CHARS),
        "bytes": save(folder / "bytes", BYTES),
        "learned": save(folder / "learned", CHARS, pos="learned"),
        "no_newline": save(folder / "no_newline", CharTokenizer("abc")),
    }


@pytest.fixture
def run(runs, capsys):
    """run("chars", "--key=value") gives stdout and stderr."""

    def run(name, *flags):
        sample.main([str(runs[name]), *flags])
        return capsys.readouterr()

    return run


def greedy(tokenizer, prompt_ids, n, **keys):
    return tokenizer.decode(generate(make(tokenizer, **keys), [prompt_ids], n, vocab_size=tokenizer.vocab_size)[0])


def test_a_prompt_is_continued_and_the_speed_reported(run):
    ids = CHARS.encode("abcab")
    out, err = run("chars", "--prompt=abcab", "--temperature=0", "--max_new_tokens=20")
    assert out == "abcab" + greedy(CHARS, ids, 20) + "\n"
    assert "prefill 5 tokens" in err and "decode 19 tokens" in err and "tokens/s" in err


def test_an_empty_prompt_starts_a_document(run):
    out, _ = run("chars", "--temperature=0", "--max_new_tokens=9")
    assert out == greedy(CHARS, CHARS.encode("\n"), 9) + "\n"
    out, _ = run("bytes", "--temperature=0", "--max_new_tokens=9")
    assert out == greedy(BYTES, [BYTES.eot], 9) + "\n"


def test_a_single_sample_is_shown_as_it_comes(run, monkeypatch):
    shown = []
    monkeypatch.setattr(sample, "show", shown.append)
    run("chars", "--prompt=abc", "--max_new_tokens=12")
    assert len(shown) == 14 and shown[0] == "abc" and all(len(text) == 1 for text in shown[1:])


def test_several_samples_come_whole_and_each_can_be_had_again_alone(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nha\n")
    flags = ["--max_new_tokens=20", "--temperature=1.5"]
    out, err = run("chars", f"--prompts_file={file}", "--num_samples=2", "--seed=5", *flags, "--num_pages=4")
    assert "preemptions" in err
    texts = [
        run("chars", f"--prompt={p}", f"--seed={5 + i}", *flags).out for i, p in enumerate(["abc", "abc", "ha", "ha"])
    ]
    assert len(set(texts)) == 4
    for i, text in enumerate(texts):
        assert f"--- prompt {i // 2 + 1}, sample {i % 2 + 1} (length) ---\n{text}" in out
    assert len(out) == sum(map(len, texts)) + 4 * len("--- prompt 1, sample 1 (length) ---\n")


def test_the_mark_at_the_beginning_of_a_prompts_file_is_no_text(run, tmp_path):
    file = tmp_path / "prompts.txt"
    texts = []
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("abc\nha\n", encoding=encoding)
        texts.append(run("chars", f"--prompts_file={file}", "--max_new_tokens=5").out)
    assert texts[0] == texts[1]


def test_a_stop_text_ends_a_sample_and_is_left_out(run):
    whole = greedy(CHARS, CHARS.encode("abcab"), 30)
    stop = whole[10:13]
    out, err = run("chars", "--prompt=abcab", "--temperature=0", "--max_new_tokens=30", f"--stop={stop}")
    assert out == "abcab" + whole[: whole.index(stop)] + "\n"
    assert f"decode {whole.index(stop) + 2} tokens" in err  # nothing is decoded behind it
    for stops in (f'["zz", "{stop}"]', f'["{stop}{whole[13:20]}", "{stop}"]'):
        assert run("chars", "--prompt=abcab", "--temperature=0", "--max_new_tokens=30", f"--stop={stops}").out == out
    out, _ = run("chars", "--prompt=abcab", "--temperature=0", "--max_new_tokens=12", f"--stop={whole[11]}zz")
    assert out == "abcab" + whole[:12] + "\n"  # its beginning alone stops nothing and is not lost


def test_a_stop_text_that_no_text_can_hold_stops_nothing(run):
    """A lone half of a character, as a command line or JSON may hold one; brackets upon brackets, which are no JSON."""
    whole = run("chars", "--temperature=0", "--max_new_tokens=9").out
    for stop in ('["\\ud800"]', "\udcff", "[" * 100_000):
        assert run("chars", "--temperature=0", "--max_new_tokens=9", f"--stop={stop}").out == whole


def test_the_end_of_text_ends_a_sample_and_is_left_out(run, monkeypatch):
    ids = generate(make(BYTES), [[104, 105]], 20, vocab_size=BYTES.vocab_size)[0]
    monkeypatch.setattr(ByteTokenizer, "eot", ids[7])
    out, _ = run("bytes", "--prompt=hi", "--temperature=0", "--max_new_tokens=20")
    assert out == "hi" + BYTES.decode(ids[: ids.index(ids[7])]) + "\n"


def test_learned_positions_end_the_default_length(run):
    out, _ = run("learned", "--prompt=abc")
    assert len(out) == 64 + 1


def test_text_outgrows_the_context_with_rope(run):
    out, _ = run("chars", "--prompt=abc", "--temperature=0", "--max_new_tokens=100")
    want = generate(make(CHARS, attention="swa", window=64), [CHARS.encode("abc")], 100, vocab_size=CHARS.vocab_size)
    assert out == "abc" + CHARS.decode(want[0]) + "\n"


def test_samples_of_a_prompt_share_its_pages(run):
    _, err = run("chars", f"--prompt={'abcdefgh' * 5}", "--num_samples=3", "--max_new_tokens=4")
    assert f"{2 * 32} tokens found in the cache" in err  # two of its two and a half pages, twice


def test_the_garbage_collector_leaves_the_model_alone(run):
    gc.unfreeze()
    run("chars", "--max_new_tokens=2")
    assert gc.get_freeze_count() > 0


def test_more_samples_than_memory_holds_begin_at_once(run, monkeypatch):
    """The engine has a few at a time, in order."""
    shown, held = [], []

    def show(text):
        shown.append(text)
        if len(shown) == 1500:
            raise KeyboardInterrupt  # the user has seen enough

    def step(engine, real=sample.Engine.step):
        held.append(len(engine.waiting) + len(engine.running))
        return real(engine)

    monkeypatch.setattr(sample, "show", show)
    monkeypatch.setattr(sample.Engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run("chars", f"--num_samples={10**30}", "--max_new_tokens=2")
    assert set(held) == {512}
    heads = [text.partition("\n")[0] for text in shown]
    assert heads == [f"--- prompt 1, sample {i} (length) ---" for i in range(1, 1501)]


def test_samples_that_come_later_are_those_that_had_come_at_once(run, monkeypatch, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("abc\nha\n")
    flags = [f"--prompts_file={file}", "--num_samples=5", "--max_new_tokens=8"]
    whole = run("chars", *flags).out
    monkeypatch.setattr(sample, "AHEAD", 3)
    assert run("chars", *flags).out == whole


def test_the_longest_sample_begins_at_once(run, monkeypatch):
    """It needs no more pages than its window."""
    shown = []

    def show(text):
        shown.append(text)
        if len(shown) == 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "show", show)
    with pytest.raises(KeyboardInterrupt):
        run("chars", f"--max_new_tokens={10**30}")


def test_min_p_draws_less_wildly(run):
    flags = ["--prompt=abc", "--max_new_tokens=20", "--temperature=30", "--top_k=0"]
    out, _ = run("chars", *flags, "--min_p=1")
    assert out == "abc" + greedy(CHARS, CHARS.encode("abc"), 20) + "\n" != run("chars", *flags).out


def test_log_probabilities_are_listed_beside_the_text(run):
    out, err = run("chars", "--prompt=abc", "--max_new_tokens=6", "--temperature=0", "--logprobs=true")
    lines = err.splitlines()
    assert lines[0] == "--- prompt 1, sample 1: log-probabilities ---" and len(lines) == 1 + 6 + 1
    assert "".join(eval(line.split()[1]) for line in lines[1:7]) == out[3:-1]
    assert all(float(line.split()[0]) <= 0 for line in lines[1:7])


# The stream


def stream(*stops):
    return sample.TextStream("name", "prompt", BYTES, [stop.encode() for stop in stops])


def test_characters_are_shown_whole():
    text = "aé€😀z"
    pieces = [stream_text for stream_text in map(stream().push, ([byte] for byte in text.encode()))]
    assert [piece for piece in pieces if piece] == list(text)


def test_a_torn_character_ends_as_a_replacement():
    torn, text = stream(), "x€".encode()[:-1]
    assert torn.push(list(text)) == "x"
    assert torn.close(text) == "\ufffd" and torn.text == "x\ufffd"


@pytest.mark.parametrize(
    "text, stop", [("aaab!", "aab"), ("abababac!", "abac"), ("x\n\ny", "\n\n"), ("né€!", "é€"), ("ab", "ab")]
)
def test_nothing_of_a_stop_text_is_shown(text, stop):
    data = text.encode()
    end = data.index(stop.encode())
    for size in range(1, 6):
        halting, given = stream(stop, "never"), ""
        for start in range(0, len(data), size):
            if data[: start + size].find(stop.encode()) >= 0:
                break  # what the engine finds, it does not hand out
            given += halting.push(list(data[start : start + size]))
            assert text[: text.index(stop)].startswith(given)
        given += halting.close(data[:end])
        assert given == halting.text == text[: text.index(stop)]


def test_text_that_only_begins_like_the_stop_text_is_given_out():
    waiting = stream("stop")
    assert waiting.push(list(b"go sto")) == "go "
    assert waiting.push(list(b"ne st")) == "stone "
    assert waiting.close(b"go stone st") == "st"


# What cannot be done


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("chars", ["--prompt=abcX"], "prompt 1: character 'X' is not in"),
        ("no_newline", [], "prompt 1: the tokenizer has no end-of-text and no newline"),
        ("chars", ["--prompt=a", "--prompts_file=b"], "exclude each other"),
        ("chars", ["--prompts_file=/nowhere/x.txt"], "prompts_file=/nowhere/x.txt cannot be read"),
        ("chars", ["--temperature=-1"], "temperature takes 0 or more, got -1.0"),
        ("chars", ["--temperature=inf"], "temperature takes 0 or more, got inf"),
        ("chars", ["--top_p=0"], "top_p takes a probability"),
        ("chars", ["--top_p=1.1"], "top_p takes a probability"),
        ("chars", ["--top_k=-1"], "top_k takes 0 or more"),
        ("chars", ["--min_p=1.5"], "min_p takes a share"),
        ("chars", ['--stop=["a", ""]'], "stop takes a text or a JSON list of texts that are not empty"),
        ("chars", ["--num_samples=0"], "num_samples takes 1 or more"),
        ("chars", ["--page_size=0"], "page_size takes 1 or more"),
        ("chars", ["--max_new_tokens=50", "--num_pages=2"], "prompt 1: 1 prompt tokens and 50 new ones need 4 pages"),
        ("chars", ["--num_pages=100000000000000"], "no memory for a cache of 100000000000000 pages"),
        ("chars", [f"--num_pages={10**300}"], "no memory for a cache of 1000000"),
        ("chars", [f"--page_size={10**30}"], "no memory for a cache of 2 pages"),
        (
            "chars",
            [f"--max_new_tokens={10**15}", f"--max_window={10**15}"],
            "no memory for a cache of 62500000000002 pages",
        ),
        ("learned", ["--prompt=abc", "--max_new_tokens=62"], "prompt 1: .* more than the 64 learned positions"),
        ("learned", [f"--prompt={'a' * 64}"], "prompt 1: .* more than the 64 learned positions"),
        ("chars", ["--temprature=1"], "the nearest is 'temperature'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, name, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run(name, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tokenizer, message",
    [(BYTES.spec, "tokenizer does not fit its model: .* 39, got 257"), (None, "unknown tokenizer spec None")],
)
def test_a_checkpoint_without_its_tokenizer(run, monkeypatch, tokenizer, message):
    real = checkpoint.load_model

    def load_model(*args):
        model, state = real(*args)
        return model, {key: value for key, value in {**state, "tokenizer": tokenizer}.items() if value}

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    with pytest.raises(UserError, match=message):
        run("chars")


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_failure_that_is_not_the_users_passes_through(run, monkeypatch, error):
    def fail(*args, **keys):
        raise error("broken")

    monkeypatch.setattr(sample, "Engine", fail)
    with pytest.raises(error, match="broken"):
        run("chars")


@pytest.mark.parametrize("content, message", [("\n \n", "is empty"), (b"\xff\xfe", "cannot be read")])
def test_a_bad_prompts_file(run, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        run("chars", f"--prompts_file={file}")


def test_folders_that_are_no_runs(tmp_path):
    for words, message in (([], "takes one run folder"), (["a", "b"], "takes one run folder, .* got a b")):
        with pytest.raises(UserError, match=message):
            sample.main(words)
    with pytest.raises(UserError, match="no run folder"):
        sample.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="no complete checkpoint"):
        sample.main([str(tmp_path)])
    (tmp_path / "checkpoints" / f"step-000001{checkpoint.UNFINISHED}").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        sample.main([str(tmp_path)])


def test_as_a_program(runs):
    result = script("sample.py", runs["bytes"], "--prompt=hi", "--max_new_tokens=5", "--dtype=bfloat16")
    assert result.stdout.startswith("hi") and "decode 4 tokens" in result.stderr
    result = script("sample.py", runs["chars"], "--prompt=X", check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: prompt 1") and result.stderr.count("\n") == 1
    shown = script("sample.py", "--help").stdout
    assert all(f"--{field.name}=" in shown for field in dataclasses.fields(sample.SampleConfig))


@pytest.mark.parametrize("attention", ["mha", "swa"])
def test_a_long_prompt_is_computed_in_few_steps(attention):
    """The pool that sample.py chooses has room for pieces of prompts beside the windows."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, max_seq_len=32, vocab_size=257, pos="rope", attention=attention)).eval()
    asked = Request([1] * 1000, 3)
    engine = sample.make_engine(model, ByteTokenizer(), sample.SampleConfig(), [asked])
    sequence = engine.add(asked)
    steps = 0
    while not sequence.generated:
        engine.step()
        steps += 1
    assert steps <= 4
