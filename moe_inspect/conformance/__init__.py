"""Are the routed experts right that a serving engine returns? Small models, requests that engines
have got wrong, and the decisions of each token beside those of the same model in transformers.

    python -m moe_inspect.conformance --save models
    vllm serve models/olmoe --enable-return-routed-experts --dtype float32
    python -m moe_inspect.conformance http://localhost:8000

In an engine's own tests it is two fixtures, `moe_inspect.conformance.fixtures`."""
