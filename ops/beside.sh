# Sourced by ops/test.sh: a command that runs beside the checks, at low priority, and never outlives them.

beside_start() { # LOG COMMAND ...: starts it; it ends when this shell does, by whatever means
  beside_log="$1"
  shift
  set -m # a process group of its own
  (
    leader=$BASHPID
    (
      trap '' TERM
      while read -r _ _ _ parent _ <"/proc/$leader/stat" && [ "$parent" = $$ ]; do sleep 1; done
      kill -TERM -- "-$leader"
      sleep 5
      kill -KILL -- "-$leader"
    ) >/dev/null 2>&1 &
    exec nice -n 5 "$@"
  ) >"$beside_log" 2>&1 </dev/null &
  beside_pid=$!
  set +m
}

beside_runs() { # as this shell knows: by now its number may be another process's
  jobs -rp | grep -qx "$beside_pid"
}

beside_stop() { # ends it with all its processes
  [ -n "${beside_pid:-}" ] || return 0
  kill -TERM -- "-$beside_pid" 2>/dev/null || true
}

beside_finish() { # NAME SECONDS: waits until this shell is SECONDS old, and says in a line how it ended
  local status=0
  while beside_runs && [ "$SECONDS" -lt "$2" ]; do sleep 0.2; done
  if beside_runs; then
    beside_stop
    printf '\n== %s: NOT TESTED: not done %s minutes after the start of all checks (%s)\n' "$1" $(($2 / 60)) "$beside_log"
    return 0
  fi
  wait "$beside_pid" || status=$?
  beside_pid=""
  case "$status" in
    0) printf '\n== %s: %s\n' "$1" "$(tail -1 "$beside_log")" ;;
    75) printf '\n== %s: NOT TESTED: %s (%s)\n' "$1" "$(tail -1 "$beside_log")" "$beside_log" ;;
    137 | 143) printf '\n== %s: NOT TESTED: ended by a signal (%s)\n' "$1" "$beside_log" ;; # memory ran out, say
    *)
      printf '\n== %s: FAILED with status %s\n' "$1" "$status"
      cat "$beside_log"
      return 1
      ;;
  esac
}
