# SPDX-License-Identifier: Apache-2.0
"""Names of `peft` and `peft.tuners` in the PEFT interface that this package does not implement.

Type checkers read them here, so that a misspelt import is an error to them. `placeholders.py` makes
the class that stands for each. Other modules declare the names that they lack themselves.
"""


class Placeholder:
    """A class for type checkers in place of one that this package does not implement."""


AdaLoraConfig = AdaLoraModel = AdamssConfig = AdamssModel = AdaptionPromptConfig = Placeholder
AdaptionPromptModel = BOFTConfig = BOFTModel = BdLoraConfig = BeftConfig = Placeholder
BeftModel = BoneConfig = BoneModel = C3AConfig = C3AModel = CPTConfig = Placeholder
CPTEmbedding = CartridgeConfig = Placeholder
CartridgeEncoder = DeftConfig = DeftModel = DeloraConfig = DeloraModel = Placeholder
FourierFTConfig = FourierFTModel = FrodConfig = FrodModel = GloraConfig = GloraModel = Placeholder
GraloraConfig = GraloraModel = HRAConfig = HRAModel = HiraConfig = HiraModel = Placeholder
IA3Config = IA3Model = KasaConfig = LNTuningConfig = LNTuningModel = LilyConfig = Placeholder
LilyModel = MissConfig = MissModel = MontecloraConfig = Placeholder
MultitaskPromptTuningConfig = MultitaskPromptTuningInit = OFTConfig = OFTModel = Placeholder
OSFConfig = OSFModel = PeanutConfig = PeanutModel = PrefixEncoder = PrefixTuningConfig = Placeholder
PromptEmbedding = PromptEncoder = PromptEncoderConfig = Placeholder
PromptEncoderReparameterizationType = PromptLearningConfig = PromptTuningConfig = Placeholder
PromptTuningInit = PsoftConfig = PsoftModel = PveraConfig = PveraModel = Placeholder
RandLoraConfig = RandLoraModel = RoadConfig = RoadModel = ShadowConfig = ShadowModel = Placeholder
ShiraConfig = ShiraModel = SupertuningConfig = SupertuningModel = Placeholder
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING = TinyLoraConfig = Placeholder
TinyLoraModel = TrainableTokensConfig = TrainableTokensModel = UniLoraConfig = Placeholder
UniLoraModel = VeloraConfig = VeraConfig = VeraModel = WaveFTConfig = WaveFTModel = Placeholder
XLoraConfig = XLoraModel = bloom_model_postprocess_past_key_value = Placeholder
compose_cartridge_adapters = find_kappa_target_modules = Placeholder
initialize_kv_prefix_from_past_key_values = Placeholder
initialize_kv_prefix_from_text = Placeholder
prompt_embeddings_from_past_key_values = Placeholder
