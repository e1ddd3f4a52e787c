# The AWS SDK for Ruby as people write it; nothing is configured but the region. When to ask and what to print is in
# README.md.

require "aws-sdk-core"

ENDPOINT = ENV["STS_ENDPOINT"]
$stdout.sync = true

def tell(word, text)
  puts "#{word} #{text.to_s.split.join(" ")}"
end

def describe(error)
  "#{error.class}: #{error.message}"
end

def load(sts)
  provider = sts.config.credentials or raise "no provider has credentials"
  provider.credentials.access_key_id
end

def identify(sts)
  tell "identity", sts.get_caller_identity.arn
rescue StandardError => e
  tell "identity-error", describe(e)
end

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC)
end

def make
  Aws::STS::Client.new(endpoint: ENDPOINT || "http://127.0.0.1:1")
end

tell "version", Aws::CORE_GEM_VERSION
watch = ARGV[0] == "watch"
left = watch ? Float::INFINITY : ARGV[0].to_i
sts = last = nil
while left.positive?
  begin
    start = now
    # One that found nothing when it was made will not look again.
    sts = make if !watch || sts&.config&.credentials.nil?
    key = load(sts)
    took = (now - start) * 1000
    if !watch || key != last
      tell "key", format("%s %.1f", key, took)
      identify(sts) if ENDPOINT
    end
    last = key
  rescue StandardError => e
    tell "error", describe(e)
  end
  watch ? sleep(0.3) : left -= 1
end
