-- wrk -s wrk.lua URL -- BODIES: posts the lines of the file BODIES in turn, and ends with a line of JSON.
local requests, place = {}, 0

function init(arguments)
  for body in io.lines(arguments[1]) do
    wrk.headers["Content-Type"] = "application/json"
    requests[#requests + 1] = wrk.format("POST", nil, nil, body)
  end
end

function request()
  place = place % #requests + 1
  return requests[place]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
