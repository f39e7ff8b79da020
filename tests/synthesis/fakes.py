import re

from hf_longalign.endpoint.protocol import Reply, RunStopped, ignore
from hf_longalign.synthesis.builder import ContextSynthesisBuilder


_NAMES = "Ada Bela Cora Dora Edna Fern Gwen Hope Iris June Kay Lena Mona Nora Olga Pia Rosa Sara Tess Uma Vera"
NAMES = _NAMES.split()


def make_pairs(count, task="narrativeqa", **more):
    return [
        {
            "instruction": f"In which year did {NAMES[n % 21]} {NAMES[n // 21]} finish the dam of the village {n}?",
            "answer": str(1800 + n),
            "task": task,
            "id": f"{task}-{n}",
            **{name: value(n) for name, value in more.items()},
        }
        for n in range(count)
    ]


def make_text(n, words=60):
    """A text about dam `n` that resembles no other one."""
    who, where = f"{NAMES[n % 21]} {NAMES[n // 21]}", f"village {n}"
    filler = " ".join(f"Stone {n * 1000 + k} was set beside stone {n * 7 + k * 13}." for k in range(words // 7))
    return f"{who} finished the dam of the {where} in {1800 + n}. {filler} The dam of {where} still stands."


class FakeGenerator:
    """Writes a context with the answer in it, a function of the request alone; can stop after so many replies."""

    concurrency = 3

    def __init__(self, model="fake", stop_after=None, fail=()):
        self.model = model
        self.asked = []
        self.stop_after = stop_after
        self.fail = set(fail)

    async def check(self):
        pass

    async def reply(self, request, notify=ignore):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise RunStopped("stopped")
        self.asked.append(request)
        text = self.write(request)
        return Reply(text, "stop", 50, len(text.split()), self.model)

    def write(self, request):
        content = request.messages[-1][1]
        number = int(re.search(r"village (\d+)\?", content)[1])
        if request.purpose == "closed_book":
            return str(1800 + number) if number % 2 else "I do not know."
        if request.purpose == "open_book":
            return str(1800 + number)
        if request.purpose == "judge":
            return "supported"
        if number in self.fail:
            return "I'm sorry, but I cannot write this."
        return f"Title: The dam of village {number}\nContext:\n{make_text(number)}"

    def drain(self):
        pass

    async def close(self):
        pass


PAIRS = make_pairs(24)
GIVEN = make_pairs(24, context=make_text)


def made(folder, config_name="chat", **options):
    options = {"seeds": PAIRS, "min_words": 20, "n_distractors": 5, "show_progress": False, **options}
    return ContextSynthesisBuilder(cache_dir=folder, config_name=config_name, **options)


def build(folder, config_name="chat", num_proc=None, **options):
    builder = made(folder, config_name, **options)
    builder.download_and_prepare(num_proc=num_proc)
    return builder


def rows(builder, split="train"):
    return builder.as_dataset(split=split).to_list()
