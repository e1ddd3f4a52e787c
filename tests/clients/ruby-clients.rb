# The Ruby gems that find credentials by themselves: one function for each, named on the command line. Nothing is
# configured but the region. When to ask and what to print is in README.md.

ENDPOINT = ENV["STS_ENDPOINT"]
$stdout.sync = true

def tell(word, text)
  puts "#{word} #{text.to_s.split.join(" ")}"
end

def describe(error)
  "#{error.class}: #{error.message}"
end

# Each makes a fresh pair: what loads the access key, and what asks whose it is.

def aws_sdk
  sts = Aws::STS::Client.new(endpoint: ENDPOINT || "http://127.0.0.1:1")
  # One that found nothing when it was made will not look again.
  provider = sts.config.credentials or raise "no provider has credentials"
  [-> { provider.credentials.access_key_id }, -> { sts.get_caller_identity.arn }]
end

# It has no GetCallerIdentity; the stand-in for S3 answers with the ARN and the access key of who has signed.
def fog
  place = { endpoint: ENDPOINT, path_style: true, region: ENV["AWS_REGION"] }
  files = Fog::Storage.new(provider: "AWS", use_iam_profile: true, **place)
  answer = nil
  [-> { (answer = files.get_object("bucket", "whoami").body.split).last }, -> { answer.first }]
end

def version(name)
  case name
  when "aws-sdk"
    require "aws-sdk-core"
    Aws::CORE_GEM_VERSION
  when "fog"
    require "fog/aws"
    Fog::AWS::VERSION
  end
end

def identify(ask)
  tell "identity", ask.call
rescue StandardError => e
  tell "identity-error", describe(e)
end

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC)
end

name, loads = ARGV
tell "version", version(name)
watch = loads == "watch"
left = watch ? Float::INFINITY : loads.to_i
pair = last = nil
while left.positive?
  begin
    start = now
    pair = nil unless watch
    pair ||= send(name.tr("-", "_"))
    key = pair[0].call
    took = (now - start) * 1000
    if !watch || key != last
      tell "key", format("%s %.1f", key, took)
      identify(pair[1]) if ENDPOINT
    end
    last = key
  rescue StandardError => e
    tell "error", describe(e)
  end
  watch ? sleep(0.3) : left -= 1
end
