-- wrk -s overload.lua URL -- BODY RATE: posts BODY, RATE times a second however fast the answers come (0: as fast as the
-- connections are answered), and ends with a line of JSON.
local ffi = require("ffi")
ffi.cdef [[
  struct marble_time { long seconds; long nanoseconds; };
  int clock_gettime(int clock, struct marble_time *now);
]]
local CLOCK_MONOTONIC = 1
local MOST_SECONDS_BEHIND = 0.1
local stamp = ffi.new("struct marble_time")
local rate, due

local function now()
  ffi.C.clock_gettime(CLOCK_MONOTONIC, stamp)
  return tonumber(stamp.seconds) + tonumber(stamp.nanoseconds) / 1e9
end

function init(arguments)
  rate = tonumber(arguments[2])
  -- Without a function `request` of its own wrk makes the bytes once, which takes it less time for each request.
  wrk.method, wrk.body = "POST", arguments[1]
  wrk.headers["Content-Type"] = "application/json"
  due = now()
end

-- One schedule for all connections: whichever is free takes the next turn. What a stall has made late is not made up for.
local function turn()
  local at = now()
  due = math.max(due + 1 / rate, at - MOST_SECONDS_BEHIND)
  return math.max(0, (due - at) * 1000)
end

-- wrk asks for it only where it exists when a thread begins, so it stands in the global table from the start.
function delay()
  return rate > 0 and turn() or 0
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %.6f, "refused": %d, "broken": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
