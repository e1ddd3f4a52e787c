//! Every client that there is, and how it is called.

use std::time::Duration;

use super::{Client, Life, Over};

/// botocore and what is made of it act as if credentials had 17 to 25 minutes left when they have less than 15.
const BOTOCORE: Life = Life::LongByClock;

const fn machine(name: &'static str, title: &'static str, words: &'static [&'static str], life: Life) -> Client {
    Client { name, title, words, over: Over::Machine, life, session: None }
}

const fn root(name: &'static str, title: &'static str, words: &'static [&'static str], life: Life) -> Client {
    Client { name, title, words, over: Over::Root, life, session: None }
}

impl Client {
    pub const BOTO3: Self = machine("boto3", "boto3", &["{python}/bin/python3", "{scripts}/boto3-client.py"], BOTOCORE);
    pub const AWS_CLI: Self = machine(
        "aws-cli",
        "AWS CLI, version 1",
        &["/usr/bin/sh", "{scripts}/tool.sh", "aws-cli", "{python}/bin/aws"],
        Life::Short,
    );
    pub const JS: Self = machine(
        "js",
        "AWS SDK for JavaScript v3",
        &["/usr/bin/env", "NODE_PATH={js}/node_modules", "{node}", "{scripts}/js-clients.cjs", "js"],
        // It goes on for minutes with what has ended before it came, which happens on a busy machine.
        Life::LongByClock,
    );
    pub const AWS_CONFIG: Self = machine("aws-config", "AWS SDK for Rust", &["{aws-config}"], Life::LongByClock);

    const fn with_sessions(self, session: Duration) -> Self {
        Self { session: Some(session), ..self }
    }

    /// The four, and those that come with a root file system of their own.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(FURTHER.iter().copied())
    }
}

macro_rules! python {
    ($name:literal, $title:literal, $life:expr) => {
        root(
            $name,
            $title,
            &[
                "/usr/bin/env",
                "PYTHONPATH={further}/python",
                // Some insist on certificates, although nothing here speaks TLS.
                "SSL_CERT_FILE={further}/python/certifi/cacert.pem",
                "/usr/bin/python3",
                "-W",
                "ignore",
                "{scripts}/further-clients.py",
                $name,
            ],
            $life,
        )
    };
}

macro_rules! js {
    ($name:literal, $package:literal, $title:literal, $life:expr) => {
        root(
            $name,
            $title,
            &[
                "/usr/bin/env",
                "NODE_PATH={further}/node_modules",
                "/usr/bin/node",
                "{scripts}/js-clients.cjs",
                $package,
            ],
            $life,
        )
    };
}

macro_rules! tool {
    ($name:literal, $title:literal, $program:literal) => {
        root($name, $title, &["/usr/bin/dash", "{scripts}/tool.sh", $name, $program], Life::Short)
    };
}

const FURTHER: &[Client] = &[
    tool!("aws-cli-2", "AWS CLI, version 2", "/usr/bin/aws"),
    python!("aiobotocore", "aiobotocore", BOTOCORE),
    python!("aws-sdk-sts", "AWS SDK for Python v4 (preview)", Life::LongTrusting),
    js!("js-v2", "aws-sdk", "AWS SDK for JavaScript v2", Life::LongByClock),
    root("go-v1", "AWS SDK for Go v1", &["{further}/go/v1"], Life::Long),
    root("go-v2", "AWS SDK for Go v2", &["{further}/go/v2"], Life::Long),
    root("ruby", "AWS SDK for Ruby", &["/usr/bin/ruby", "{scripts}/ruby-clients.rb", "aws-sdk"], Life::LongByClock),
    root("fog-aws", "fog-aws (Ruby)", &["/usr/bin/ruby", "{scripts}/ruby-clients.rb", "fog"], Life::Long),
    root("vm-ec2", "VM::EC2 (Perl)", &["/usr/bin/perl", "{scripts}/perl-client.pl"], Life::Long),
    root(
        "php",
        "AsyncAws (PHP)",
        &[
            "/usr/bin/php8.4",
            "-d",
            "extension=curl",
            "-d",
            "extension=dom",
            "-d",
            "extension=simplexml",
            "{scripts}/php-client.php",
        ],
        Life::Long,
    ),
    python!("awscrt", "AWS CRT (Python)", Life::Long),
    js!("aws-crt", "aws-crt", "AWS CRT (JavaScript)", Life::Long),
    python!("pyarrow", "AWS SDK for C++ (in pyarrow)", Life::LongByPeriod),
    python!("duckdb", "DuckDB (SDK for C++)", Life::Long),
    root(
        "gdal",
        "GDAL (in fiona)",
        &[
            "/usr/bin/env",
            "PYTHONPATH={further}/python",
            "LD_LIBRARY_PATH={further}/python/fiona.libs",
            "/usr/bin/python3",
            "{scripts}/further-clients.py",
            "gdal",
        ],
        Life::Long,
    ),
    root(
        "java",
        "Java's HttpURLConnection",
        &["/usr/lib/jvm/java-21-openjdk-amd64/bin/java", "{scripts}/Client.java"],
        Life::Long,
    ),
    tool!("curl", "curl", "/usr/bin/curl"),
    tool!("curl-v1", "curl, IMDSv1", "/usr/bin/curl"),
    js!("aws-lite", "@aws-lite/client", "aws-lite", Life::Long),
    python!("minio", "MinIO's client for Python", Life::Long),
    root("minio-go", "MinIO's client for Go", &["{further}/go/minio"], Life::Long),
    python!("obstore", "object_store (Rust)", Life::Long),
    // It signs with nothing that has less than 10 seconds left.
    python!("opendal", "OpenDAL (Rust)", Life::LongTrusting).with_sessions(Duration::from_secs(30)),
    tool!("rclone", "rclone (SDK for Go v2)", "{further}/python/bin/rclone"),
    tool!("s5cmd", "s5cmd (SDK for Go v1)", "{further}/python/s5cmd/bin/s5cmd"),
    tool!("s3cmd", "s3cmd", "/usr/bin/s3cmd"),
];
