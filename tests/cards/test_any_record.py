"""Every record has a card, whatever is known and whatever is not."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records.test_base import values

from cards.test_scores import REPORT
from hf_longalign.cards import adapter_card, dataset_card, merge_card
from hf_longalign.cards.dataset import DataRecord
from hf_longalign.records import TrainingRecord
from hf_longalign.records.training import RopeRecord


ROPE = st.builds(
    RopeRecord,
    model_type=st.just("llama"),
    max_position_embeddings=st.none() | st.integers(1, 10**7),
    rope_parameters=st.none()
    | st.fixed_dictionaries(
        {}, optional={"rope_type": st.just("yarn"), "factor": st.floats(1, 64), "rope_theta": st.floats(1e3, 1e7)}
    )
    | st.just(
        {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
    ),
)
ANY = settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)


@ANY
@given(st.data())
def test_of_a_training(data):
    record = data.draw(
        st.builds(
            lambda record, rope: TrainingRecord.from_json({**record.to_json(), "rope": rope.to_json()}),
            values(TrainingRecord),
            ROPE,
        )
    )
    config = data.draw(
        st.sampled_from([None, {}, {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}])
    )
    report = data.draw(st.sampled_from([None, REPORT]))
    card = adapter_card(record, config, report)
    assert merge_card(card, card) == card


@ANY
@given(st.data())
def test_of_a_data_set(data):
    record = replace(
        data.draw(values(DataRecord)),
        splits={"chat": {"train": 3}},
        method=data.draw(st.sampled_from(["given", "context", "instruction"])),
        # Codes: YAML would fold a line break of Unicode's, which none has, into a blank.
        languages=data.draw(st.lists(st.sampled_from(["en", "de", "zh"]), max_size=2)),
    )
    card = dataset_card(record)
    assert merge_card(card, card) == card
