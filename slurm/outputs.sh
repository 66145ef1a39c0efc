# What each stage leaves behind, and whether it is up to date; sourced by common.sh and pipeline.sh.
# shellcheck shell=bash disable=SC2154

# refuse_dry_run ARGUMENT...: a job would write all the same (merge), or be taken for the finished stage
refuse_dry_run() {
  if [[ " $* " == *' --dry-run '* ]]; then
    echo "error: no job takes --dry-run, so nothing is submitted or run; python tools/plan.py --config CONFIG plans all" \
      "stages, python launch/train.py --config CONFIG --dry-run prints the config and the plan of one" >&2
    exit 2
  fi
}

# is_forced: whether --force is among the settings
is_forced() { [[ " ${settings[*]} " == *' --force '* ]]; }

# outputs_of STAGE: its files, in the array `files`
outputs_of() {
  case $1 in
  prepare) files=("$run/histories/manifest.json") ;;
  summarize) files=("$run"/shards/{train,valid,test}/manifest.json) ;;
  base) files=("$run/base/config.json") ;;
  train) files=("$run/checkpoints/latest") ;;
  merge) files=("$run/merged/config.json") ;;
  evaluate) files=("$run/evaluation/$split.json") ;;
  esac
}

# finished STAGE: its output is there, made with exactly these settings, and nothing that it was made from has moved on
finished() {
  local file files
  outputs_of "$1"
  for file in "${files[@]}"; do [ -e "$file" ] || return 1; done
  if is_forced || is_outdated "$1"; then return 1; fi
  if has_settings "$run/logs/finished-$1.yaml"; then return; fi
  [ "$1" != train ] && has_settings "$run/config/$1.yaml" # that of a training is there from its beginning on
}

has_settings() { [ "$merged_config" = "$(cat "$1" 2>/dev/null)" ]; }

# keep_settings: what a job was asked for, now that it is done: the next chain leaves it out
keep_settings() {
  python tools/setting.py "${asked[@]}" >"$logs/settings.yaml"
  mv "$logs/settings.yaml" "$run/logs/finished-$stage.yaml"
}

# is_outdated STAGE: the checkpoint has moved on since the merge, or the merged model since the evaluation
is_outdated() {
  case $1 in
  merge)
    local pointer="$run/checkpoints/best" # as merge_lora.py chooses
    [ -e "$pointer" ] || pointer="$run/checkpoints/latest"
    ! grep -qsF "\"checkpoint $(cat "$pointer")\"" "$run/merged/provenance.json"
    ;;
  evaluate)
    [ -e "$run/evaluation/$split/manifest.json" ] &&
      ! grep -qs "$(sha256sum <"$run/merged/manifest.json" | cut -d' ' -f1)" "$run/evaluation/$split/manifest.json"
    ;;
  *) return 1 ;;
  esac
}
