"""Transformers of diffusers that denoise audio, tiny."""

from __future__ import annotations

from tests.architectures.draws import HEAD, SHAPE, TEXT, WIDTH, Denoiser, Draw, Inputs


def _stable_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(32, 16),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
        "global_hidden_states": draw.noise(1, 32),
        "rotary_embedding": draw.angles(17, HEAD // 2),
    }


def _ace_step(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(8, 32),
        "timestep": draw.shares(),
        "timestep_r": draw.shares(),
        "encoder_hidden_states": draw.text(),
        "context_latents": draw.noise(8, 64),
    }


def _longcat_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(16, 32),
        "encoder_hidden_states": draw.text(),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.shares(),
        "latent_cond": draw.noise(16, 32),
    }


def _stable_audio_3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(32, 16),
        "timestep": draw.shares(),
        "encoder_hidden_states": draw.text(),
        "global_hidden_states": draw.noise(32),
        "local_add_cond": draw.noise(32, 16),
    }


def _film(draw: Draw) -> Inputs:
    """Return notes that are encoded already, and the spectrogram."""
    notes = [(draw.noise(8, WIDTH), draw.full(1.0, 8))]
    return {"encodings_and_masks": notes, "decoder_input_tokens": draw.noise(16, 32), "decoder_noise_time": draw.shares()}


DENOISERS: dict[str, Denoiser] = {
    "StableAudioDiTModel": Denoiser(
        _stable_audio,
        {
            **SHAPE, "sample_size": 16, "in_channels": 32, "num_layers": 3, "num_key_value_attention_heads": 2, "out_channels": 32,
            "cross_attention_dim": 32, "time_proj_dim": 32, "global_states_input_dim": 32, "cross_attention_input_dim": 32,
        },
    ),
    "AceStepTransformer1DModel": Denoiser(
        _ace_step,
        {
            "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "in_channels": 96, "audio_acoustic_hidden_dim": 32, "encoder_hidden_size": TEXT, "sliding_window": 4,
        },
    ),
    "LongCatAudioDiTTransformer": Denoiser(
        _longcat_audio,
        {"dit_dim": WIDTH, "dit_depth": 3, "dit_heads": 4, "dit_text_dim": TEXT, "latent_dim": 32, "ff_mult": 2.0},
    ),
    "MiniMaxMusic3Transformer1DModel": Denoiser(
        lambda d: {"hidden_states": d.noise(32, 16), "timestep": d.shares(), "encoder_hidden_states": d.noise(16, TEXT)},
        {
            **SHAPE, "in_channels": 32, "condition_dim": TEXT, "num_layers": 3, "ff_inner_dim": 96, "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
    ),
    "StableAudio3DiTModel": Denoiser(
        _stable_audio_3,
        {
            "io_channels": 32, "embed_dim": WIDTH, "depth": 3, "num_heads": 4, "cond_token_dim": TEXT, "global_cond_dim": 32,
            "local_add_cond_dim": 32, "timestep_features_dim": 32, "ff_mult": 2.0, "num_memory_tokens": 4,
        },
    ),
    "T5FilmDecoder": Denoiser(
        _film,
        {"input_dims": 32, "targets_length": 16, "d_model": WIDTH, "num_layers": 3, "num_heads": 4, "d_kv": 16, "d_ff": 96},
    ),
}  # fmt: skip
