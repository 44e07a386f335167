#!/usr/bin/env bash
# TextVQA under the name that LLaVA's README gives its script.
exec bash "$(dirname "${BASH_SOURCE[0]}")/textvqa.sh" "$@"
