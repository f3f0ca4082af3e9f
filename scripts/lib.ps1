# What the scripts beside this file share; they dot-source it. Windows PowerShell 5.1 and PowerShell 7.
# Its twin for bash is lib.sh.

Set-StrictMode -Version 2.0
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'

$OnWindows = $env:OS -eq 'Windows_NT'
$Scripts = $PSScriptRoot
$Root = Split-Path -Parent $Scripts
$Venv = Join-Path $Root '.venv'
$VenvPython = Join-Path $Venv 'bin/python'
if ($OnWindows) {
    $VenvPython = Join-Path $Venv 'Scripts\python.exe'
}
$ServiceNames = @('lock', 'queue', 'cache', 'secure')
$ServiceRequirements = @('distributed-lock-py', 'queue-py', 'cache-py', 'secure-app-py') | ForEach-Object {
    Join-Path (Join-Path $Root $_) 'requirements.txt'
}

# One line on stderr, exit code $Code.
function Stop-WithError {
    param([string]$Message, [int]$Code = 1)
    [Console]::Error.WriteLine("error: $Message")
    exit $Code
}

# The service named on the command line (default all); anything else is answered with the usage.
function Get-ServiceArgument {
    param([string]$Script, [object[]]$Words)
    $usage = "usage: $Script [all|$($ServiceNames -join '|')]"
    if ($Words.Count -eq 0) {
        return 'all'
    }
    $word = [string]$Words[0]
    if ($Words.Count -eq 1 -and @('-h', '-help', '--help') -contains $word) {
        Write-Host $usage
        exit 0
    }
    if (-not ((@('all') + $ServiceNames) -ccontains $word)) {
        [Console]::Error.WriteLine("error: unknown service `"$word`"")
    }
    elseif ($Words.Count -eq 1) {
        return $word
    }
    [Console]::Error.WriteLine($usage)
    exit 2
}

# Run Python code with one candidate: what it printed, or nothing when it cannot be run. Windows PowerShell
# turns a native command's stderr into errors and loses double quotes in arguments: the code has none.
function Invoke-Candidate {
    param([string[]]$Command, [string]$Code)
    $ErrorActionPreference = 'Continue'
    try {
        $program = $Command[0]
        $rest = @($Command | Select-Object -Skip 1)
        return @(& $program @rest -c $Code 2>$null)
    }
    catch {
        return @()
    }
}

# The path of an interpreter that is new enough and able to make environments. $env:PYTHON decides if set.
function Find-Python {
    $candidates = @('python'), @('python3'), @('py', '-3')
    if ($env:PYTHON) {
        $candidates = @(, @($env:PYTHON))
    }
    $code = "import sys, importlib.util as u; print(sys.executable); print('%d.%d' % sys.version_info[:2]); " +
        "print('is too old' if sys.version_info < (3, 11) else 'ok' if u.find_spec('ensurepip') else 'has no venv module')"
    $seen = @()
    foreach ($candidate in $candidates) {
        $answer = @(Invoke-Candidate -Command $candidate -Code $code)
        if ($answer.Count -eq 3 -and $answer[2] -eq 'ok') {
            return $answer[0]
        }
        $said = 'does not run'
        if ($answer.Count -eq 3) {
            $said = "$($answer[1]) $($answer[2])"
        }
        $seen += "  $($candidate -join ' '): $said"
    }
    $found = $seen -join [Environment]::NewLine
    Stop-WithError ("Python 3.11 or newer is needed (every older version is past its end of life). Found:" +
        [Environment]::NewLine + $found + [Environment]::NewLine +
        'Install one (https://www.python.org/downloads/), or name it: $env:PYTHON = "C:\path\to\python.exe"')
}

# Make .venv and install requirement files into it; quick when there is nothing to do.
function Initialize-Environment {
    param([string[]]$Files)
    $python = $VenvPython
    $works = @()
    if (Test-Path -LiteralPath $python) {
        $works = @(Invoke-Candidate -Command @($python) -Code 'import sys; print(sys.version_info >= (3, 11))')
    }
    if ($works.Count -ne 1 -or $works[0] -ne 'True') {
        $python = Find-Python
    }
    & $python (Join-Path $Scripts 'environment.py') $Venv @Files
    if ($LASTEXITCODE -ne 0) {
        exit $LASTEXITCODE
    }
}

# Start, stop or list this copy's clusters; leaves the exit code in $LASTEXITCODE.
function Invoke-Nodes {
    param([string]$Verb, [string]$Service)
    $python = $VenvPython
    if (-not (Test-Path -LiteralPath $python)) {
        $python = Find-Python
    }
    & $python (Join-Path $Scripts 'clusters.py') $Verb $Service
}
